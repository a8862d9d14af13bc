"""What tyro reads command lines of bench/ by; fastflower itself does not need it."""

try:
    import tyro
    from tyro.conf import FlagCreatePairsOff, OmitSubcommandPrefixes, arg, subcommand
except ImportError as error:
    raise SystemExit('error: tyro, which reads options of bench/, is missing: pip install -e ".[bench]".') from error

__all__ = ["FlagCreatePairsOff", "OmitSubcommandPrefixes", "arg", "subcommand", "tyro"]
