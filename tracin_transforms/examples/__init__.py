"""Reading training and query examples, with stable ids."""
