"""Dockerfile, compose.yaml and k8s/ are valid, and everything they name exists in this project."""

import configparser
import inspect
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from copy import deepcopy
from importlib.resources import files
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import boto3
import jsonschema
import kubernetes_validate
import pytest
import typer.main
import yaml
from flower.urls import handlers

from farm import catalog
from farm.settings import Settings
from farm.storage import open_store
from farm.storage.s3 import S3Store

ROOT = Path(__file__).resolve().parents[1]
K8S = ROOT / "k8s"
BASE, CPU, KEDA = K8S / "base", K8S / "overlays/cpu", K8S / "components/keda"
DOCS = (ROOT / "docs/deploy.md").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
COMPOSE_SCHEMA = files("check_jsonschema") / "builtin_schemas/vendor/compose-spec.json"
SETTINGS = {f"FARM_{name.upper()}" for name in Settings.model_fields}
OTHERS = {"AWS_SHARED_CREDENTIALS_FILE", "STORE", "POSTGRES_USER", "POSTGRES_DB", "POSTGRES_PASSWORD_FILE"}
KINDS = {"Deployment", "StatefulSet", "Job", "Service", "NetworkPolicy", "ScaledObject"}
OUR_IMAGES = {"farm-control", "farm-worker"}

Doc = dict[str, Any]


# --- reading: Compose as it stands, Kustomize by its simplest rules ------------------------------


def compose() -> Doc:
    doc: Doc = yaml.safe_load((ROOT / "compose.yaml").read_text())
    return doc


def key(doc: Doc) -> tuple[str, str]:
    return doc["kind"], doc["metadata"]["name"]


def by_key(docs: Iterable[Doc]) -> dict[tuple[str, str], Doc]:
    return {key(doc): doc for doc in docs}


def patched(docs: list[Doc], patch: Doc) -> list[Doc]:
    """Apply a patch of the two forms used here. Raises KeyError if what it changes is not there."""
    changes = yaml.safe_load(patch["patch"])
    target = patch.get("target") or {"kind": changes["kind"], "name": changes["metadata"]["name"]}
    found = by_key(docs)[target["kind"], target["name"]]
    if isinstance(changes, dict):
        assert changes["$patch"] == "delete"
        return [doc for doc in docs if doc is not found]
    for change in changes:
        *path, last = change["path"].strip("/").split("/")
        part = found
        for step in path:
            part = part[step]
        assert change["op"] == "remove"
        del part[last]
    return docs


def build(folder: Path, plan: Doc | None = None) -> list[Doc]:
    """What `kubectl kustomize` makes of a folder."""
    plan = plan or yaml.safe_load((folder / "kustomization.yaml").read_text())
    docs: list[Doc] = []
    for name in plan["resources"]:
        path = folder / name
        docs += build(path) if path.is_dir() else list(yaml.safe_load_all(path.read_text()))
    for name in plan.get("components", []):
        part = yaml.safe_load((folder / name / "kustomization.yaml").read_text())
        docs += build(folder / name, {"resources": part["resources"]})
        for patch in part.get("patches", []):
            docs = patched(docs, patch)
    for patch in plan.get("patches", []):
        docs = patched(docs, patch)
    tags = {image["name"]: image["newTag"] for image in plan.get("images", [])}
    for doc in docs:
        if "namespace" in plan and doc["kind"] != "Namespace":
            doc["metadata"]["namespace"] = plan["namespace"]
        for container in pod(doc).get("containers", []):
            name = container["image"].partition(":")[0]
            if name in tags:
                container["image"] = f"{name}:{tags[name]}"
    return docs


def with_keda(folder: Path) -> Doc:
    """A GPU farm that scales: what docs/deploy.md tells its reader to write."""
    return {
        "namespace": "farm",
        "resources": [os.path.relpath(BASE, folder)],
        "components": [os.path.relpath(KEDA, folder)],
    }


def pod(doc: Doc) -> Doc:
    spec: Doc = doc.get("spec", {}).get("template", {}).get("spec", {})
    return spec


def everything() -> list[Doc]:
    """All documents of k8s/ once: the CPU farm, and the GPU farm with KEDA."""
    return list((by_key(build(K8S, with_keda(K8S))) | by_key(build(CPU))).values())


def containers(docs: list[Doc]) -> Iterator[tuple[Doc, Doc]]:
    for doc in docs:
        for container in pod(doc).get("containers", []):
            yield doc, container


def is_ours(container: Doc) -> bool:
    return container["image"].partition(":")[0] in OUR_IMAGES


def dockerfile() -> dict[str, list[str]]:
    """The instructions of each stage, FROM first; continued lines joined, comments left out."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.M)
    stages: dict[str, list[str]] = {}
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        if line.startswith("FROM "):
            stages[line.rpartition(" AS ")[2]] = []
        if line:
            list(stages.values())[-1].append(line)
    return stages


# --- the checks: each gives the faults it finds --------------------------------------------------


def compose_faults(doc: Doc) -> list[str]:
    schema = json.loads(COMPOSE_SCHEMA.read_text())
    validator = jsonschema.validators.validator_for(schema)(schema)
    return [error.message for error in validator.iter_errors(doc)]


# KEDA's own schema is in no package: the fields of ScaledObject (2.15 to 2.22) and of its Prometheus trigger
def _closed(required: str, **properties: Any) -> Doc:
    return {
        "type": "object",
        "properties": properties,
        "required": required.split(),
        "additionalProperties": False,
    }


_TEXT, _WHOLE = {"type": "string"}, {"type": "integer", "minimum": 0}
_PROMETHEUS = ("serverAddress", "query", "threshold", "activationThreshold", "namespace", "ignoreNullValues")
SCALED_OBJECT = _closed(
    "apiVersion kind metadata spec",
    apiVersion={"const": "keda.sh/v1alpha1"},
    kind={"const": "ScaledObject"},
    metadata=_closed("name", name=_TEXT, namespace=_TEXT),
    spec=_closed(
        "scaleTargetRef triggers",
        scaleTargetRef=_closed("name", name=_TEXT, kind=_TEXT, apiVersion=_TEXT),
        pollingInterval=_WHOLE,
        cooldownPeriod=_WHOLE,
        initialCooldownPeriod=_WHOLE,
        minReplicaCount=_WHOLE,
        maxReplicaCount=_WHOLE,
        fallback=_closed("failureThreshold replicas", failureThreshold=_WHOLE, replicas=_WHOLE),
        triggers={
            "type": "array",
            "items": _closed(
                "type metadata",
                type={"const": "prometheus"},
                metadata=_closed("serverAddress query threshold", **dict.fromkeys(_PROMETHEUS, _TEXT)),
            ),
        },
    ),
)


def k8s_faults(docs: list[Doc]) -> list[str]:
    faults = []
    for doc in docs:
        try:
            if doc["apiVersion"].startswith("keda.sh/"):
                jsonschema.validate(doc, SCALED_OBJECT)
            else:
                kubernetes_validate.validate(doc, kubernetes_validate.latest_version(), strict=True)
        except (kubernetes_validate.ValidationError, jsonschema.ValidationError) as e:
            faults.append(f"{key(doc)}: {e.message}")
    return faults


def command_faults(argv: list[str]) -> list[str]:
    """Whether this project understands a command: `farm …` by its own parser, without running it."""
    match argv:
        case ["farm", *rest]:
            return _farm_faults(rest)
        case ["python", "-m", "workers", *rest]:
            return _worker_faults(rest)
        case ["python", "-c", code]:
            compile(code, "command", "exec")
            return []
        case ["sleep", _]:
            return []
    return [f"unknown command {argv}"]


def _farm_faults(argv: list[str]) -> list[str]:
    from farm.cli import app

    return parse_faults(typer.main.get_command(app), argv)


def parse_faults(command: Any, argv: list[str]) -> list[str]:
    """Parse as the program would, down to the last subcommand; nothing is invoked."""
    try:
        context = command.make_context("farm", list(argv))
        while hasattr(command, "resolve_command"):
            _, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])
            context = command.make_context(command.name, rest, parent=context)
    except Exception as e:  # a usage error of click, or of the one typer brings: they share no base
        if not hasattr(e, "format_message"):
            raise
        return [f"farm {' '.join(argv)}: {e.format_message()}"]
    return []


def _worker_faults(argv: list[str]) -> list[str]:
    if "--help" in argv:
        return []
    run = [sys.executable, "-m", "workers", "--help"]
    known = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60).stdout
    faults = [f"unknown option {a}" for a in argv if a.startswith("--") and not re.search(rf"{a}\b", known)]
    pools = {model.pool for model in catalog.read(catalog.BUILTIN).values()}
    return faults + [f"unknown pool {p}" for p in argv[argv.index("--pool") + 1 :][:1] if p not in pools]


def variable_faults(variables: dict[str, Any]) -> list[str]:
    faults = [name for name in variables if name not in SETTINGS | OTHERS]
    ours = {name[5:].lower(): value for name, value in variables.items() if name in SETTINGS}
    Settings(**ours)  # each value is one that its setting takes
    return faults


def compose_commands(doc: Doc) -> list[list[str]]:
    ours = [s for s in doc["services"].values() if is_ours(s)]
    checks = [s["healthcheck"]["test"] for s in ours if "healthcheck" in s]
    assert all(check[0] == "CMD" for check in checks)
    return [s["command"] for s in ours] + [check[1:] for check in checks]


def k8s_commands(docs: list[Doc]) -> list[list[str]]:
    ours = [container for _, container in containers(docs) if is_ours(container)]
    hooks = [hook for c in ours for name, hook in c.items() if name.endswith("Probe")]
    hooks += [hook for c in ours for hook in c.get("lifecycle", {}).values()]
    return [c["args"] for c in ours] + [hook["exec"]["command"] for hook in hooks if "exec" in hook]


def docker_commands() -> list[list[str]]:
    lines = [line for stage in dockerfile().values() for line in stage]
    runs = [line for line in lines if re.match(r"(HEALTHCHECK .*)?CMD ", line)]
    return [json.loads(line.partition("CMD ")[2]) for line in runs]


def k8s_variables(docs: list[Doc]) -> dict[str, Any]:
    maps = [doc["data"] for doc in docs if doc["kind"] == "ConfigMap"]
    variables = {name: value for data in maps for name, value in data.items()}
    return variables | {v["name"]: v["value"] for _, c in containers(docs) for v in c.get("env", [])}


# --- the files are valid -------------------------------------------------------------------------


def test_compose_yaml_follows_the_published_specification() -> None:
    assert compose_faults(compose()) == []


@pytest.mark.parametrize("broken", ["healthchek", "commnad", "stop_grace"])
def test_a_typo_in_a_service_is_refused(broken: str) -> None:
    doc = compose()
    doc["services"]["api"][broken] = {}

    assert compose_faults(doc)


def test_every_document_of_k8s_is_valid() -> None:
    docs = everything()

    assert k8s_faults(docs) == []
    assert {doc["kind"] for doc in docs} >= KINDS


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_typo_in_a_document_of_k8s_is_refused(kind: str) -> None:
    doc = deepcopy(next(doc for doc in everything() if doc["kind"] == kind))
    doc["spec"]["replcias"] = 2

    assert k8s_faults([doc])


def test_kustomize_names_every_file_below_it() -> None:
    for plan in K8S.rglob("kustomization.yaml"):
        named = {"kustomization.yaml", *yaml.safe_load(plan.read_text())["resources"]}
        assert {path.name for path in plan.parent.glob("*.yaml")} <= named, plan


def test_a_patch_without_its_target_is_refused() -> None:
    with pytest.raises(KeyError):
        patched(build(BASE), {"patch": "{kind: Deployment, metadata: {name: nobody}, $patch: delete}"})


@pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl is not installed")
@pytest.mark.parametrize("name", ["base", "cpu", "keda"])
def test_kubectl_builds_what_these_tests_read(name: str, tmp_path: Path) -> None:
    folder = {"base": BASE, "cpu": CPU, "keda": tmp_path}[name]
    if name == "keda":
        kind = {"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization"}
        (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(kind | with_keda(tmp_path)))

    run = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=True)

    assert by_key(yaml.safe_load_all(run.stdout)) == by_key(build(folder))


# --- what they name exists -----------------------------------------------------------------------


def test_every_command_is_one_of_the_project() -> None:
    commands = compose_commands(compose()) + k8s_commands(everything()) + docker_commands()
    ours = {argv[1] for argv in commands if argv[0] == "farm"}

    assert [fault for argv in commands for fault in command_faults(argv)] == []
    assert ours == {"api", "sweep", "intake", "deliver", "flower", "migrate", "healthcheck"}


@pytest.mark.parametrize(
    "argv",
    ["farm serve", "farm healthcheck nobody", "farm api --no-such-option", "farm migrate now", "weed server",
     "python -m workers --pool nobody", "python -m workers --pool sdxl --cards 0"],
)  # fmt: skip
def test_a_command_the_project_does_not_have_is_found(argv: str) -> None:
    assert command_faults(argv.split())


def test_every_variable_is_a_setting_with_a_value_it_takes() -> None:
    services = compose()["services"].values()

    assert [fault for s in services for fault in variable_faults(s.get("environment", {}))] == []
    assert variable_faults(k8s_variables(everything())) == []
    assert set(re.findall(r"\bFARM_[A-Z_]+\b", DOCS)) <= SETTINGS


def test_a_variable_that_is_no_setting_is_found() -> None:
    assert variable_faults({"FARM_API_HOSTS": "0.0.0.0"}) == ["FARM_API_HOSTS"]
    with pytest.raises(ValueError, match="grace_s"):
        variable_faults({"FARM_GRACE_S": "half a minute"})


def test_the_storage_url_is_one_the_farm_opens() -> None:
    for variables in (compose()["x-env"], k8s_variables(build(BASE))):
        assert isinstance(open_store(variables["FARM_STORAGE_URL"]), S3Store)
    for url in re.findall(r"s3://[^`…]+(?=`)", DOCS):
        assert isinstance(open_store(url), S3Store)


def test_the_ports_are_those_of_the_settings() -> None:
    ports = {Settings.model_fields[name].default for name in ("api_port", "flower_port")}
    control = dockerfile()["control"]
    ours = [c for _, c in containers(everything()) if is_ours(c)]

    assert {int(p) for line in control if line.startswith("EXPOSE") for p in line.split()[1:]} == ports
    assert {port["containerPort"] for c in ours for port in c.get("ports", [])} == ports
    published = [port for s in compose()["services"].values() for port in s.get("ports", [])]
    assert set(published) == {f"127.0.0.1:{port}:{port}" for port in ports}


def test_every_probe_asks_a_path_that_answers() -> None:
    from farm.api.app import create_app

    api = set(create_app().openapi()["paths"])
    flower = {handler[0] for handler in handlers if isinstance(handler, tuple)}
    paths = {"api": api, "flower": flower, "store": {"/healthz"}}
    probes = [(doc, c, p["httpGet"]) for doc, c in containers(everything())
              for name, p in c.items() if name.endswith("Probe") and "httpGet" in p]  # fmt: skip

    for doc, container, probe in probes:
        assert probe["path"] in paths[doc["metadata"]["name"]]
        assert probe["port"] in {port["name"] for port in container["ports"]}
    template = by_key(everything())["Deployment", "api"]["spec"]["template"]
    assert template["metadata"]["annotations"]["prometheus.io/path"] in api


def test_services_budgets_and_policies_select_pods_that_exist() -> None:
    docs = everything()
    pods = [doc["spec"]["template"]["metadata"]["labels"] for doc in docs if pod(doc)]
    for doc in docs:
        spec = doc["spec"] if doc["kind"] in {"Service", "PodDisruptionBudget", "NetworkPolicy"} else {}
        wanted = spec.get("selector", spec.get("podSelector", {}))
        wanted = wanted.get("matchLabels", wanted)
        assert any(wanted.items() <= labels.items() for labels in pods), key(doc)


def test_the_images_carry_the_projects_version() -> None:
    images = {s["image"] for s in compose()["services"].values() if is_ours(s)}
    images |= {c["image"] for docs in (build(BASE), build(CPU)) for _, c in containers(docs) if is_ours(c)}

    assert images == {f"{name}:{PROJECT['version']}" for name in OUR_IMAGES}


def test_the_dockerfile_takes_from_the_project_what_exists_and_is_not_ignored() -> None:
    stages = dockerfile()
    rules = [r for r in (ROOT / ".dockerignore").read_text().splitlines() if r and not r.startswith("#")]
    lines = [line for stage in stages.values() for line in stage]
    sources = {s for line in lines if re.match(r"COPY (?!--from)", line) for s in line.split()[1:-1]}
    extras = {e for line in lines for e in re.findall(r'"\.\[(\w+)\]"', line)}
    targets = {s["build"]["target"] for s in compose()["services"].values() if "build" in s}

    assert {s for s in sources if not (ROOT / s).exists()} == set()
    assert {s for s in sources if f"!{s}" not in rules} == set()
    assert rules[0] == "*"
    assert {rule[1:] for rule in rules if rule.startswith("!")} == sources
    assert extras == {"worker"}
    assert extras <= set(PROJECT["optional-dependencies"])
    assert targets == {"control", "worker"} <= set(stages)


def test_only_the_worker_image_holds_torch() -> None:
    assert not any("[worker]" in line for line in dockerfile()["build-control"])
    assert any("--from=build-control" in line for line in dockerfile()["control"])
    assert not any(requirement.startswith("torch") for requirement in PROJECT["dependencies"])


def test_the_images_run_as_the_same_stranger_everywhere() -> None:
    stages = dockerfile()
    assert "USER 10001:10001" in stages["control"]
    assert "USER 10001:10001" in stages["worker"]
    for doc, container in containers(everything()):
        assert pod(doc)["securityContext"]["runAsUser"] == 10001 or not is_ours(container)


# --- what they promise ---------------------------------------------------------------------------


def test_a_worker_is_given_more_time_than_its_grace_and_an_upload_that_is_tried_again() -> None:
    store = {name: p.default for name, p in inspect.signature(S3Store.__init__).parameters.items()}
    upload_s = store["give_up_after_s"] + store["connect_timeout_s"] + store["read_timeout_s"]
    grace_s = Settings.model_fields["grace_s"].default
    workers = [doc for doc, c in containers(everything()) if c["image"].startswith("farm-worker")]
    in_compose = [s for s in compose()["services"].values() if s["image"].startswith("farm-worker")]

    assert float(k8s_variables(build(BASE))["FARM_GRACE_S"]) == grace_s
    assert min(pod(doc)["terminationGracePeriodSeconds"] for doc in workers) > grace_s + upload_s
    assert min(int(s["stop_grace_period"].removesuffix("s")) for s in in_compose) > grace_s + upload_s


def test_tini_signals_the_parent_alone() -> None:
    assert dockerfile()["base"][-1] == 'ENTRYPOINT ["tini", "--"]'
    assert all("command" not in c for _, c in containers(everything()))  # it would replace the entrypoint
    assert all("entrypoint" not in s for s in compose()["services"].values())


def test_pods_have_no_token_no_service_links_and_no_rights() -> None:
    for doc, container in containers(everything()):
        spec, rights = pod(doc), container["securityContext"]
        assert spec["automountServiceAccountToken"] is False  # nothing can be mounted below /run/secrets
        assert spec["enableServiceLinks"] is False  # FLOWER_PORT=tcp://… would reach Flower
        assert spec["securityContext"]["runAsNonRoot"]
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert rights["readOnlyRootFilesystem"]
        assert rights["capabilities"] == {"drop": ["ALL"]}
        assert rights["allowPrivilegeEscalation"] is False
        assert container["resources"]["requests"].keys() >= {"cpu", "memory"}


def test_the_cpu_farm_asks_for_no_gpu_and_the_other_for_one_a_worker() -> None:
    gpus = {
        name: [c["resources"]["requests"].get("nvidia.com/gpu") for _, c in containers(build(folder))
               if c["image"].startswith("farm-worker")]
        for name, folder in (("cpu", CPU), ("base", BASE))
    }  # fmt: skip

    assert gpus == {"cpu": [None], "base": [1]}
    assert "nvidia" not in json.dumps(build(CPU))


def test_keda_scales_a_pool_by_all_its_models() -> None:
    docs = by_key(everything())
    scaled = [doc["spec"] for (kind, _), doc in docs.items() if kind == "ScaledObject"]
    code = "\n".join(path.read_text() for path in (ROOT / "farm").rglob("*.py"))

    for spec in scaled:
        target = docs["Deployment", spec["scaleTargetRef"]["name"]]
        args = pod(target)["containers"][0]["args"]
        query = spec["triggers"][0]["metadata"]["query"]
        ((metric, models),) = re.findall(r'\((\w+)\{model=~"([^"]+)"\}\)', query)
        pool = catalog.read(catalog.BUILTIN).pool(args[args.index("--pool") + 1])
        assert set(models.split("|")) == {model.name for model in pool}
        assert "replicas" not in target["spec"]
        assert metric in code


def test_compose_starts_each_service_after_what_it_needs() -> None:
    services = compose()["services"]
    for name, service in services.items():
        for needed, how in service.get("depends_on", {}).items():
            if how["condition"] == "service_healthy":
                assert "healthcheck" in services[needed], (name, needed)
            else:
                assert how["condition"] == "service_completed_successfully"
                assert services[needed]["restart"] == "no", (name, needed)
    assert services["sweep"]["deploy"]["replicas"] == 2
    assert {tuple(s["profiles"]) for s in services.values() if "profiles" in s} == {("cpu",), ("gpu",)}


def test_compose_asks_for_no_variable_that_the_docs_do_not_name() -> None:
    text = (ROOT / "compose.yaml").read_text()
    asked = set(re.findall(r"(?<!\$)\$\{?([A-Z_]+)", text))

    assert {name for name in asked if f"{name}=" not in DOCS} == set()
    assert len(asked) == len(re.findall(r"\$\{[A-Z_]+:-", text))  # each has a default


# --- secrets -------------------------------------------------------------------------------------


@pytest.fixture
def secrets(tmp_path: Path) -> Path:
    """The folder that the lines in docs/deploy.md make, run as they stand."""
    lines = next(block for block in re.findall(r"```sh\n(.*?)```", DOCS, re.S) if "mkdir" in block)
    subprocess.run(["sh", "-eu", "-c", lines], cwd=tmp_path, check=True, timeout=30)
    return tmp_path / "secrets"


def test_the_documented_lines_make_every_secret_and_keep_strangers_out(secrets: Path) -> None:
    doc = compose()
    made = {path.stem for path in secrets.iterdir()}
    used = {name for s in doc["services"].values() for name in s.get("secrets", [])}
    volumes = [v["secret"] for d in everything() for v in pod(d).get("volumes", []) if "secret" in v]

    assert made == used == doc["secrets"].keys()
    assert {s["file"] for s in doc["secrets"].values()} == {f"./secrets/{name}.txt" for name in made}
    assert {item["key"] for volume in volumes for item in volume["items"]} == made
    assert {volume["secretName"] for volume in volumes} == {"farm"}
    assert all(item["key"] == item["path"] for volume in volumes for item in volume["items"])
    assert secrets.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in secrets.iterdir()} == {0o644}


def test_the_farm_reads_the_documented_secrets(secrets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in secrets.iterdir():
        path.rename(path.with_suffix(""))  # as both mount them
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)

    settings = Settings(_secrets_dir=secrets)

    password = (secrets / "postgres_password").read_text().strip()
    queue = (secrets / "redis_conf").read_text().split()[1]
    assert settings.database_url.get_secret_value() == f"postgresql://farm:{password}@postgres:5432/farm"
    assert settings.broker_url.get_secret_value() == f"redis://:{queue}@redis:6379/0"
    assert len(settings.secret.get_secret_value()) >= 32
    assert len(settings.flower_password.get_secret_value()) >= 32
    ours = {name for name in compose()["secrets"] if name.startswith("farm_")}
    assert {f"FARM_{name[5:].upper()}" for name in ours} <= SETTINGS


def test_the_store_knows_the_key_the_farm_signs_with(secrets: Path) -> None:
    config = configparser.ConfigParser()
    config.read(secrets / "aws_credentials.txt")

    (identity,) = json.loads((secrets / "store_s3.txt").read_text())["identities"]

    (pair,) = identity["credentials"]
    assert pair["accessKey"] == config["default"]["aws_access_key_id"]
    assert pair["secretKey"] == config["default"]["aws_secret_access_key"]


def test_no_secret_is_in_a_variable_an_image_or_the_repository() -> None:
    names = set(k8s_variables(everything())) - {"POSTGRES_PASSWORD_FILE"}
    names |= {name for s in compose()["services"].values() if is_ours(s) for name in s["environment"]}
    ignored = (ROOT / ".gitignore").read_text().split()
    built = [line for stage in dockerfile().values() for line in stage if line.startswith(("ENV", "ARG"))]

    assert not re.search(r"SECRET|PASSWORD|TOKEN|KEY|DATABASE_URL|BROKER_URL", " ".join(names))
    assert not re.search(r"SECRET|PASSWORD|TOKEN|KEY", " ".join(built))
    assert {"/secrets/", "/models/"} <= set(ignored)
    assert not any(doc["kind"] == "Secret" for doc in everything())


# --- the store's bucket --------------------------------------------------------------------------


@pytest.fixture
def s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An S3 server without a bucket."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "TMPDIR": str(tmp_path), "SERVICES": "s3"}
    env |= {"BIND_HOST": "127.0.0.1", "GATEWAY_PORT": str(port), "SFTP_ENABLED": "0", "IOT_MTLS_ENABLED": "0"}
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    command, quiet = [sys.executable, "-m", "ministack"], subprocess.DEVNULL
    with subprocess.Popen(command, env=env, stdout=quiet, stderr=quiet) as server:
        try:
            until = monotonic() + 90
            while not listens(port):
                assert monotonic() < until, "ministack did not start"
                sleep(0.1)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.kill()


def listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def test_the_bucket_service_makes_the_bucket_once_and_may_run_again(s3: str) -> None:
    in_compose = compose()["services"]["bucket"]["command"]
    in_k8s = pod(by_key(everything())["Job", "bucket"])["containers"][0]["args"]
    run = [sys.executable, *in_compose[1:]]
    assert in_compose == in_k8s

    for _ in range(2):
        subprocess.run(run, env=os.environ | {"STORE": s3}, check=True, timeout=120)

    client = boto3.client("s3", endpoint_url=s3, region_name="us-east-1")
    assert [bucket["Name"] for bucket in client.list_buckets()["Buckets"]] == ["farm"]
    url = compose()["x-env"]["FARM_STORAGE_URL"].replace("http://store:8333", s3)
    open_store(url).check()
