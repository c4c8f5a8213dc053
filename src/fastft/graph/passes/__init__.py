"""One rewrite a file, each (graph, regions, spec) -> report."""
