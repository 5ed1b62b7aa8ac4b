"""PTransforms, which only wire functions of core and storage together."""
