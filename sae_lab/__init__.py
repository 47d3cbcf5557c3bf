"Take a transformer's activations apart into features, in a notebook."
__version__ = "0.1.0"
