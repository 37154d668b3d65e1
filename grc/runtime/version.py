"""The version of grc."""

VERSION = "0.1.0"
