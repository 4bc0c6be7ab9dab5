"""A stand-in for the appliance's `csctl`: it prints the list of jobs that a file holds, as one release or another does.

Three tables are those of public sources, with our labels in place of theirs and shorter addresses; two are made up.
"""

from __future__ import annotations

import sys
from pathlib import Path

TABLE_2023 = """\
NAME                          AGE    PHASE      SYSTEMS                USER     LABELS
wsjob-eyjapwgnycahq9tus4w7id  88s    RUNNING    cer-cs2-01             username  {labels}
"""
"""argonne-lcf/user-guides, docs of the CS-2 in 2023: job-queuing-and-submission.md"""
TABLE_R2 = """\
NAME                          AGE  DURATION  PHASE    SYSTEMS     USER     LABELS        DASHBOARD
wsjob-thjj8zticwsylhppkbmjqe  13s  1s        RUNNING  cer-cs2-01  username {labels}  https://grafana/d/WebHNShVz/wsjob
"""
"""the same page at commit 1702a1a, of release 2"""
TABLE_NOW = """\
SESSION       NAME                          TYPE     PRIORITY  AGE  DURATION  PHASE    SYSTEMS  USER     \
LABELS          WORKFLOW                      DASHBOARD
job-operator  wsjob-ewhzngfg6rdjhw3s3k2wbh  compile  P2 (299)  12m  12m       RUNNING           username {labels}  \
wflow-wuetecva5mb8riup5swrff  https://grafana/d/WebHNShVz/wsjob-dashboard?orgId=1&var-wsjob=wsjob-ewhzngfg6rdjhw3s3k2wbh
"""
"""the same page of the CS-3, text of October 2025: a compile job holds no system"""
TABLE_NAMESPACED = """\
NAME                                       TYPE     PRIORITY  AGE  DURATION  PHASE      SYSTEMS   USER  LABELS
job-operator/wsjob-uzsr3ycihbnhmwgqo6odqp  execute  P2 (299)  9s   9s        RUNNING    systemf0  lab   {labels}
"""
"""made up after a description of `csctl job list` of release 2.5, with namespaces in names: no output was at hand"""
JSON_LIST = """\
{{"items": [{{"meta": {{"type": "job", "name": "wsjob-cc4ypvcbgcpwtgaydam5wz", "namespace": "job-operator", \
"labels": {{{labels}}}, "workflow": "wflow-a"}}, "spec": {{"user": {{"username": "me"}}, "priority": "P2 (299)"}}, \
"status": {{"phase": "QUEUED", "systems": []}}}}]}}
"""
"""the messages JobList, Job and ObjectMeta of cerebras_appliance 2.10.0 written as JSON; no output
of `csctl get jobs -o json` was at hand"""
TABLES = {"2023": TABLE_2023, "R2": TABLE_R2, "now": TABLE_NOW, "namespaced": TABLE_NAMESPACED, "json": JSON_LIST}

PROGRAM = """#!{python} -S
import json, pathlib, sys, time
folder, arguments = pathlib.Path(__file__).parent, sys.argv[1:]
if (folder / "delay").exists(): time.sleep(float((folder / "delay").read_text()))
if (folder / "down").exists(): sys.exit("rpc error: code = Unavailable")
jobs, asked = (folder / "jobs").read_text(), arguments[:2]
with (folder / "asked").open("a") as log: print(*arguments, file=log)
if asked == ["get", "jobs"]:
    is_json = jobs.lstrip().startswith("{{")
    if "-o" in arguments and not is_json: sys.exit("Error: unknown shorthand flag: 'o' in -o")
    print(jobs, end="")
elif arguments == ["--version"]:
    print("csctl version 3.0.1")
elif asked == ["cancel", "job"]:
    name = arguments[2]
    if jobs.lstrip().startswith("{{"):
        left = [job for job in json.loads(jobs)["items"] if job["meta"]["name"] != name]
        (folder / "jobs").write_text(json.dumps({{"items": left}}))
    else:
        left = [line for line in jobs.splitlines() if name not in line]
        (folder / "jobs").write_text("".join(line + chr(10) for line in left))
    with (folder / "cancelled").open("a") as log: print(name, file=log)
    print("Job canceled successfully")
else:
    sys.exit(2)
"""


def write_csctl(folder: Path, jobs: str = "") -> Path:
    """Write the program into a folder for PATH, with the list that it prints; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "csctl").write_text(PROGRAM.format(python=sys.executable))
    (folder / "csctl").chmod(0o755)
    (folder / "jobs").write_text(jobs)
    return folder


def jobs_with(label: str, release: str = "now") -> str:
    """The list of one unfinished job that has `label` and one of somebody else's labels."""
    if release == "json":
        key, value = label.split("=")
        return JSON_LIST.format(labels=f'"name": "llama2_7b", "{key}": "{value}"')
    return TABLES[release].format(labels=f"name=llama2_7b,{label}")
