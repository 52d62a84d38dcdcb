"""``python -m fused_adaptive.playground [--host 127.0.0.1] [--port 7860]``"""

from __future__ import annotations

import argparse
import sys


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fused_adaptive.playground")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in (default: %(default)s)")
    parser.add_argument("--port", type=int, help="default: the first free one from 7860 on")
    arguments = parser.parse_args()
    try:
        from . import page
    except ImportError as error:
        sys.exit(f"The playground needs more packages ({error}): pip install 'fused_adaptive[playground]'")
    page.launch(server_name=arguments.host, server_port=arguments.port)


if __name__ == "__main__":
    main()
