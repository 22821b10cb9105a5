"""The command's entry point, also as ``python -m mto_analysis``, where scripts are not on the path."""

import sys


def main() -> None:
    """Run the command; Ctrl-C before its work begins ends as later: with one line and code 130."""
    try:
        from mto_analyze import app

        app(prog_name="mto-analyze")
    except KeyboardInterrupt:
        sys.stderr.write("mto-analyze: error: interrupted; nothing half-written was left behind\n")
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
