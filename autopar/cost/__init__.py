"""What a choice costs: seconds and bytes of compute, communication, memory and the pipeline."""
