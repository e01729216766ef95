"""Runs the steps of a Dockerfile without Docker: each stage in a fresh root of its own, made by debootstrap.

Only for stages on Debian's own images (FROM debian:<suite>-...). As Docker does, it runs RUN in the stage's directory
with its environment, copies what COPY says from the checkout or from an earlier stage, and at the end runs commands in
the last stage as its user. Needs root and debootstrap. Without them `--no-root` runs what can be run in a temporary
directory: COPY, and the steps that call neither apt-get nor useradd, with the roots' paths put below that directory.

    python docker/run_steps.py docker/Dockerfile.cpu --carry BUNDLE --then "edgeprune doctor" --then "edgeprune run ..."
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import ssl
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dockerfile_parse import DockerfileParser

CONTEXT = Path(__file__).resolve().parents[1]
MIRROR = "http://deb.debian.org/debian"
AUTHORITIES = "/etc/machine-authorities.pem"  # those the machine trusts, of a proxy too
PASSED_ON = re.compile(r"(?i)(pip_(cert|index_url|extra_index_url|trusted_host|default_timeout|proxy)|.*_proxy)")
SYSTEM_STEPS = ("apt-get", "useradd", "groupadd")
# In a mount table of its own, so that nothing stays mounted.
ENTER = 'mount -t proc proc "$1/proc"; root=$1; user=$2; shift 2; PATH=$PATH:/usr/sbin exec chroot "$user" "$root" "$@"'
QUIET = ("LABEL", "HEALTHCHECK", "ENTRYPOINT", "CMD", "EXPOSE")


@dataclass
class Stage:
    """One FROM and what follows.

    Attributes:
        name: after AS, or its number.
        root: the folder that stands for /.
        environment: what ENV and ARG have set.
        folder: what WORKDIR says.
        user: "uid:gid" of USER.
        ran: RUN steps that were run.
        skipped: those that were not.
    """

    name: str
    image: str
    root: Path
    environment: dict[str, str] = field(default_factory=dict)
    folder: str = "/"
    user: str | None = None
    ran: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)


def read_steps(path: Path) -> list[tuple[str, str]]:
    """Return the instructions of a Dockerfile and what they say, continued lines joined, comments left out."""
    with tempfile.TemporaryDirectory() as folder:  # the parser wants the file under its own name
        shutil.copy(path, Path(folder) / "Dockerfile")
        parsed = DockerfileParser(path=folder).structure
    return [(one["instruction"], one["value"]) for one in parsed if one["instruction"] != "COMMENT"]


def expand(text: str, environment: Mapping[str, str]) -> str:
    """Return a text with ${NAME} and $NAME of the environment put in."""
    return re.sub(r"\$\{?(\w+)\}?", lambda match: environment.get(match[1], ""), text)


class Builder:
    """Runs the steps.

    Args:
        work: an empty folder for the roots.
        rooted: make real roots and change into them.
        arguments: values for ARG.
    """

    def __init__(self, work: Path, rooted: bool, arguments: Mapping[str, str]) -> None:
        self.work, self.rooted, self.arguments = work, rooted, dict(arguments)
        self.stages: list[Stage] = []

    def build(self, steps: Sequence[tuple[str, str]]) -> Stage:
        """Run all steps and return the last stage."""
        for instruction, value in steps:
            if instruction == "FROM":
                self._begin(value)
            elif instruction not in QUIET:
                getattr(self, f"_{instruction.lower()}")(value)
        return self.stages[-1]

    def call(self, stage: Stage, command: str, user: str | None = None) -> None:
        """Run a shell command in a stage; raises CalledProcessError."""
        environment = {name: value for name, value in os.environ.items() if PASSED_ON.fullmatch(name)}
        environment |= {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root"}
        environment |= stage.environment
        if self.rooted:
            as_user = f"--userspec={user}" if user else "--userspec=0:0"
            whole = ["/usr/bin/unshare", "--mount", "/bin/sh", "-ec", ENTER, "sh", str(stage.root), as_user]
            if (stage.root / AUTHORITIES[1:]).is_file():
                environment |= {"PIP_CERT": AUTHORITIES}
            if user:
                environment["HOME"] = "/home/edgeprune"
            subprocess.run(
                [*whole, "/bin/sh", "-ec", f"cd {shlex.quote(stage.folder)}; {command}"], env=environment, check=True
            )
            return
        environment = {name: self._below(stage, value) for name, value in environment.items()}
        environment["PATH"] += os.pathsep + os.environ["PATH"]
        folder = stage.root / stage.folder.lstrip("/")
        subprocess.run(["/bin/sh", "-ec", self._below(stage, command)], env=environment, cwd=folder, check=True)

    def _below(self, stage: Stage, text: str) -> str:
        """Return a text whose paths of the image lie below the stage's folder; the programs' own stay."""
        return re.sub(r"(?<![\w./-])/(?=(opt|src|work|root|home)\b)", f"{stage.root}/", text)

    def _begin(self, value: str) -> None:
        words = value.split()
        name = words[2] if len(words) == 3 else str(len(self.stages))
        stage = Stage(name, words[0], self.work / f"stage-{len(self.stages)}")
        say(f"FROM {value}")
        match = re.fullmatch(r"debian:([a-z]+)-\d+(-slim)?", stage.image)
        if match is None:
            raise SystemExit(f"{stage.image}: only Debian's own images can be stood in for")
        stage.root.mkdir(parents=True)
        if self.rooted:
            self._bootstrap(match[1], stage.root)
        else:
            for folder in ("opt", "src", "work", "root", "home/edgeprune"):
                (stage.root / folder).mkdir(parents=True)
        self.stages.append(stage)

    def _bootstrap(self, suite: str, root: Path) -> None:
        """Make a minimal Debian; what the machine needs to reach the network is taken over."""
        base = self.work / f"base-{suite}"
        if not base.exists():
            quiet = self.work / "debootstrap.log"
            with quiet.open("w") as log:
                done = subprocess.run(
                    ["debootstrap", "--variant=minbase", suite, str(base), MIRROR], stdout=log, stderr=log, check=False
                )
            if done.returncode:
                raise SystemExit(quiet.read_text()[-2000:])
        subprocess.run(["cp", "-a", f"{base}/.", str(root)], check=True)
        for name in ("/etc/resolv.conf", "/etc/pip.conf"):
            if Path(name).is_file():
                shutil.copy(name, root / name[1:])
        authorities = ssl.get_default_verify_paths().cafile or os.environ.get("PIP_CERT")
        if authorities and Path(authorities).is_file():  # beside the root's own, which its packages write
            shutil.copy(authorities, root / AUTHORITIES[1:])

    def _arg(self, value: str) -> None:
        name, _, default = value.partition("=")
        self.stages[-1].environment[name] = self.arguments.get(name, default)

    def _env(self, value: str) -> None:
        stage = self.stages[-1]
        for word in shlex.split(value):
            name, _, text = word.partition("=")
            stage.environment[name] = expand(text, stage.environment)

    def _workdir(self, value: str) -> None:
        self.stages[-1].folder = value
        (self.stages[-1].root / value.lstrip("/")).mkdir(parents=True, exist_ok=True)

    def _user(self, value: str) -> None:
        self.stages[-1].user = value

    def _copy(self, value: str) -> None:
        say(f"COPY {value}")
        words, source, stage = value.split(), CONTEXT, self.stages[-1]
        owner = None
        while words[0].startswith("--"):
            option, _, text = words.pop(0).partition("=")
            if option == "--from":
                source = next(one.root for one in self.stages if one.name == text)
            elif option == "--chown":
                owner = text
        *names, target = words
        for name in names:
            self._copy_one(source / name.lstrip("/"), stage, target, owner)

    def _copy_one(self, source: Path, stage: Stage, target: str, owner: str | None) -> None:
        into = stage.root / (target if target.startswith("/") else f"{stage.folder}/{target}").lstrip("/")
        if target.endswith("/"):
            into = into / source.name
        into.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, into, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, into)
        if owner and self.rooted:
            subprocess.run(["chown", "-R", owner, str(into)], check=True)
        if not self.rooted and source.is_relative_to(self.work):  # programs know where they were made
            self._move_paths(into, next(one for one in self.stages if source.is_relative_to(one.root)).root, stage.root)

    def _move_paths(self, folder: Path, old: Path, new: Path) -> None:
        for path in [*folder.glob("bin/*"), *folder.glob("pyvenv.cfg")]:
            if path.is_file() and not path.is_symlink():
                data = path.read_bytes()
                path.write_bytes(data.replace(str(old).encode(), str(new).encode()))

    def _run(self, value: str) -> None:
        stage = self.stages[-1]
        command = " ".join(value.split())
        if not self.rooted and any(word in command for word in SYSTEM_STEPS):
            say(f"RUN {command}\n  skipped: it changes the system")
            stage.skipped.append(command)
            return
        say(f"RUN {command}")
        self.call(stage, value, stage.user)
        stage.ran.append(command)


def say(text: str) -> None:
    """Print a step."""
    sys.stdout.write(f"==> {text}\n")
    sys.stdout.flush()


def main(arguments: Sequence[str] | None = None) -> int:
    """Build, then run the commands."""
    parser = argparse.ArgumentParser(description="Run the steps of a Dockerfile without Docker.")
    parser.add_argument("dockerfile", type=Path)
    parser.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--no-root", action="store_true", help="no roots: what can be run in a temporary directory")
    parser.add_argument("--carry", action="append", default=[], type=Path, help="put into the directory of the image")
    parser.add_argument("--then", action="append", default=[], metavar="COMMAND", help="run in the image as its user")
    options = parser.parse_args(arguments)
    values = dict(one.split("=", 1) for one in options.build_arg)
    with tempfile.TemporaryDirectory(prefix="edgeprune-image-") as folder:
        Path(folder).chmod(0o755)
        builder = Builder(Path(folder).resolve(), not options.no_root, values)
        stage = builder.build(read_steps(options.dockerfile))
        work = stage.root / stage.folder.lstrip("/")
        for path in options.carry:
            if path.is_dir():
                shutil.copytree(path, work / path.name)
            else:
                shutil.copy(path, work / path.name)
        for command in options.then:
            say(command)
            builder.call(stage, command, stage.user)
        ran, skipped = ([step for one in builder.stages for step in getattr(one, kind)] for kind in ("ran", "skipped"))
        say(f"{len(ran)} RUN steps ran, {len(skipped)} were skipped; {len(options.then)} commands ran in the image")
    return 0


if __name__ == "__main__":
    sys.exit(main())
