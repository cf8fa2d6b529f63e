"""Runs a command with an emulated bucket of Google Cloud Storage on this machine.

    pip install gcsfs gcp-storage-emulator
    python -m tools.fake_bucket python main.py --config=configs/digits.py --workdir=gs://bucket/run

The bucket is called "bucket". Its objects are kept in the folder --keep, or in memory without it.
"""

import argparse
import os
import subprocess
import sys
from typing import Any

from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import objects

PORT = 9023


def download_with_generation(
    request: Any, response: Any, storage: Any, *args: Any, download: Any = objects.download, **kwargs: Any
) -> Any:
    """Adds the object's generation to the response, as the real service does, because tensorstore needs it."""
    try:
        obj = storage.get_file_obj(request.params["bucket_name"], request.params["object_id"])
        response["x-goog-generation"] = str(obj["generation"])
    except NotFound:
        pass
    return download(request, response, storage, *args, **kwargs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", help="folder for the objects of the bucket")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    args = parser.parse_args()

    objects.download = download_with_generation
    from gcp_storage_emulator.server import create_server  # its import reads the handlers

    storage = {"data_dir": args.keep} if args.keep else {"in_memory": True}
    server = create_server("localhost", PORT, default_bucket="bucket", **storage)
    server.start()
    url = f"http://localhost:{PORT}"
    env = os.environ | {
        "STORAGE_EMULATOR_HOST": url,
        "TENSORSTORE_GCS_HTTP_URL": url,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
    }
    try:
        code = subprocess.run(args.command, env=env, check=False).returncode
    finally:
        server.stop()
    sys.exit(code)


if __name__ == "__main__":
    main()
