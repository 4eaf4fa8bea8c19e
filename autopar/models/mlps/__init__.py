"""Feed-forward parts: each file's ``make(spec, ffn, output_std)`` is a module; `choice` says which a spec has."""
