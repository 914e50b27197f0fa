"""A trained generator in files that need no training program: safetensors, ONNX, a model card; and from files."""
