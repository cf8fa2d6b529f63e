"""Runs a command against a bucket of Google Cloud Storage that is none: an emulator on this machine.

    pip install gcsfs gcp-storage-emulator
    python -m tools.fake_bucket python main.py --config=configs/digits.py --workdir=gs://bucket/run

The bucket is called "bucket", and kept in the folder --keep, if given, else forgotten.
"""

import argparse
import os
import subprocess
import sys

from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import objects

PORT = 9023


def download_with_generation(request, response, storage, *args, download=objects.download, **kwargs):
    """Says which generation of the object it is, as the real service does: tensorstore depends on it."""
    try:
        obj = storage.get_file_obj(request.params["bucket_name"], request.params["object_id"])
        response["x-goog-generation"] = str(obj["generation"])
    except NotFound:
        pass
    return download(request, response, storage, *args, **kwargs)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", help="folder that the bucket is kept in")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    args = parser.parse_args()

    objects.download = download_with_generation
    from gcp_storage_emulator.server import create_server  # looks the handlers up when it is imported

    place = {"data_dir": args.keep} if args.keep else {"in_memory": True}
    server = create_server("localhost", PORT, default_bucket="bucket", **place)
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
