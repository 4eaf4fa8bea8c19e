"""How attention and MLP join the residual stream: each file's ``make(spec, positions, layer)`` is a `Block`."""
