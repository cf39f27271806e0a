"""Benchmarks of vision models: classification, features, retrieval, detection, segmentation."""
