"""What lies on disk: files, manifests, results, gradient factors."""
