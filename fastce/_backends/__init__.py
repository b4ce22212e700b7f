"""One file per backend; `fastce.registry` is the only module that knows them all."""
