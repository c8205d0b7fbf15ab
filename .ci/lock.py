"""Write requirements-lock.txt: the versions and hashes that CI installs (Python 3.11, Linux on x86-64).

    pip install --dry-run --ignore-installed --quiet --report report.json -r requirements-dev.txt
    python .ci/lock.py report.json > requirements-lock.txt

Make it anew on purpose only, and land it with a green suite: a release elsewhere must not break us overnight.
"""
import json
import sys

with open(sys.argv[1], encoding="utf8") as file:
    items = json.load(file)["install"]
print("# Written by .ci/lock.py from requirements-dev.txt: Python 3.11, Linux on x86-64.")
for item in sorted(items, key=lambda item: item["metadata"]["name"].lower()):
    digest = item["download_info"]["archive_info"]["hashes"]["sha256"]
    print(f"{item['metadata']['name']}=={item['metadata']['version']} --hash=sha256:{digest}")
