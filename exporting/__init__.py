"""A trained generator in files that need no training program: safetensors, ONNX, a model card. No options."""
