"""One module per job: parse options, build the graph, run."""
