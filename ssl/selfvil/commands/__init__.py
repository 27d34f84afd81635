"""The commands of `selfvil`, by subject. Each imports what it calls when it runs, so that `selfvil --help` is fast."""
