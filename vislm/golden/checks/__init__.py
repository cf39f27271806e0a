"""One module per method, named as in the fixtures' metadata, with ``check(fixture) -> Iterator[Comparison]``."""
