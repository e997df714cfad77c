"""The command `searchfm`, and `python -m searchfm`."""

import signal


def main() -> None:
    """Imports the command line and runs it. Ctrl-C during the imports ends the process without a traceback."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from searchfm import cli

    cli.main()


if __name__ == "__main__":
    main()
