"""Image classifiers in ONNX files, from any exporter."""
