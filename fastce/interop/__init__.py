"""Other libraries' arrays and engines; each module is loaded when its library is wanted."""
