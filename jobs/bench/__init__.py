"""This project's hot paths beside the libraries it could have used: a module each, of `vhs bench`."""
