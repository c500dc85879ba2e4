"""One file a subcommand of `l2m`: a dataclass whose fields are its flags. `cli` runs them."""
