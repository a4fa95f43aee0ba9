"""The Kubernetes resources against the API's schemas, and against each other."""

import re
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from bench import topology
from bench.sizing import QUEUE_BYTES
from esper_otel.settings import EsperSettings

ROOT = Path(__file__).parents[2]
BASE = ROOT / "deploy" / "kubernetes"
API = "1.33"
COLLECTOR = ROOT / "collector"
GATEWAY = (COLLECTOR / "gateway.yaml").read_text()
COMPOSE = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())["services"]

KUSTOMIZATION = yaml.safe_load((BASE / "kustomization.yaml").read_text())
CONFIGS = yaml.safe_load((COLLECTOR / "kustomization.yaml").read_text())
RESOURCES = [
    resource
    for path in sorted(BASE.glob("*.yaml"))
    if path.name != "kustomization.yaml"
    for resource in yaml.safe_load_all(path.read_text())
]
BY_NAME = {(one["kind"], one["metadata"]["name"]): one for one in RESOURCES}


def pods():
    for one in RESOURCES:
        if "template" in one.get("spec", {}):
            yield one["metadata"]["name"], one["spec"]["template"]


PODS = dict(pods())
CLAIMS = {
    one["metadata"]["name"]: one["spec"].get("volumeClaimTemplates", ())
    for one in RESOURCES
    if one["kind"] == "StatefulSet"
}


def containers(pod):
    return [*pod["spec"].get("initContainers", ()), *pod["spec"]["containers"]]


EVERY = [
    pytest.param(name, container, id=f"{name}/{container['name']}")
    for name, pod in PODS.items()
    for container in containers(pod)
]


@pytest.mark.parametrize(
    "resource", RESOURCES, ids=lambda r: f"{r['kind']}/{r['metadata']['name']}"
)
def test_the_api_would_take_it(resource):
    kubernetes_validate.validate(resource, API, strict=True)


def test_the_validator_would_find_a_mistake():
    wrong = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "a"},
        "spec": {"prots": []},
    }
    with pytest.raises(kubernetes_validate.ValidationError, match="prots"):
        kubernetes_validate.validate(wrong, API, strict=True)


def test_the_kustomization_names_every_file_and_no_other():
    files = {path.name for path in BASE.glob("*.yaml")} - {"kustomization.yaml"}
    named = {*KUSTOMIZATION["resources"]}
    assert named == files | {"../../collector"}
    assert (BASE / "../../collector/kustomization.yaml").exists()


def test_a_name_is_given_once():
    assert len(BY_NAME) == len(RESOURCES)


def test_the_configurations_are_those_of_the_collector():
    made = {one["name"]: one["files"] for one in CONFIGS["configMapGenerator"]}
    for pod in PODS.values():
        mounted = [v["configMap"]["name"] for v in pod["spec"]["volumes"] if "configMap" in v]
        for name in mounted:
            (file,) = made[name]
            assert (COLLECTOR / file).exists()
            (container,) = containers(pod)
            assert container["args"] == [f"--config=/etc/esper/{file}"]
            read = set(re.findall(r"\$\{env:(\w+)", (COLLECTOR / file).read_text()))
            assert {one["name"] for one in container["env"]} <= read | {"GOMEMLIMIT"}


@pytest.mark.parametrize(("name", "container"), EVERY)
def test_a_container_is_pinned_bounded_and_hardened(name, container):
    assert container["image"] in {service["image"] for service in COMPOSE.values()}
    assert container["resources"]["limits"]["memory"]
    security = container["securityContext"]
    assert security["readOnlyRootFilesystem"]
    assert security["allowPrivilegeEscalation"] is False
    assert security["capabilities"] == {"drop": ["ALL"]}
    pod = PODS[name]["spec"]
    assert pod["automountServiceAccountToken"] is False
    mounts = {one["name"] for one in container["volumeMounts"]}
    claimed = {one["metadata"]["name"] for one in CLAIMS.get(name, ())}
    assert mounts <= {volume["name"] for volume in pod["volumes"]} | claimed
    runs_as_root = (
        security.get("runAsUser", pod.get("securityContext", {}).get("runAsUser")) == 0
    )
    assert runs_as_root is (name == "esper-agent"), "its folder on the node belongs to root"


def test_tamiyo_is_a_native_sidecar_that_shares_a_socket_in_memory():
    pod = PODS["trainer"]["spec"]
    (sidecar,) = pod["initContainers"]
    (trainer,) = pod["containers"]
    assert sidecar["restartPolicy"] == "Always"
    assert pod["restartPolicy"] == "Never"
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes["socket"]["emptyDir"]["medium"] == "Memory"
    told = {one["name"]: one.get("value") for one in trainer["env"]}
    socket = told["ESPER_TAMIYO_SOCKET"]
    assert f"--socket={socket}" in sidecar["args"]
    for container in (sidecar, trainer):
        places = {one["name"]: one["mountPath"] for one in container["volumeMounts"]}
        assert socket.startswith(f"{places['socket']}/")
    assert pod["securityContext"]["runAsUser"] == 10001


def test_a_trainer_is_told_what_it_knows():
    (trainer,) = PODS["trainer"]["spec"]["containers"]
    example = {"ESPER_RUN_ID": "trainer", "ESPER_RANK": "0"}
    told = {one["name"]: one.get("value") or example[one["name"]] for one in trainer["env"]}
    ours = {name: value for name, value in told.items() if name.startswith("ESPER_")}
    settings = EsperSettings.from_environment(ours)
    assert (settings.rank, settings.world_size) == (0, 1)


def test_a_service_leads_to_pods_that_listen_there():
    for kind, name in BY_NAME:
        if kind != "Service":
            continue
        service = BY_NAME[kind, name]["spec"]
        pod = PODS[name]
        assert service["selector"].items() <= pod["metadata"]["labels"].items()
        listening = {p["containerPort"] for c in containers(pod) for p in c["ports"]}
        assert {port["port"] for port in service["ports"]} <= listening


def test_the_autoscaler_and_the_budget_are_the_gateways():
    scaler = BY_NAME["HorizontalPodAutoscaler", "esper-gateway"]["spec"]
    target = scaler["scaleTargetRef"]
    assert (target["kind"], target["name"]) in BY_NAME
    assert scaler["minReplicas"] >= 2
    assert "replicas" not in BY_NAME[target["kind"], target["name"]]["spec"]
    budget = BY_NAME["PodDisruptionBudget", "esper-gateway"]["spec"]["selector"]["matchLabels"]
    assert budget.items() <= PODS["esper-gateway"]["metadata"]["labels"].items()


def test_a_gateway_is_what_the_runbook_counts_with():
    scaler = BY_NAME["HorizontalPodAutoscaler", "esper-gateway"]["spec"]
    (metric,) = scaler["metrics"]
    (gateway,) = containers(PODS["esper-gateway"])
    # The share is of what is requested, not of what there is.
    assert float(gateway["resources"]["requests"]["cpu"]) == topology.GATEWAY_CORES
    assert metric["resource"]["target"]["averageUtilization"] == topology.BUSY * 100
    counted = re.findall(r"agents, (\d+) gateways", topology.PAGE.read_text())
    assert counted
    for gateways in map(int, counted):
        assert scaler["minReplicas"] <= gateways <= scaler["maxReplicas"]


def test_a_gateways_queues_come_back_with_it_and_it_has_time_to_send_them():
    gateway = BY_NAME["StatefulSet", "esper-gateway"]["spec"]
    assert gateway["serviceName"] == "esper-gateway"
    (claim,) = CLAIMS["esper-gateway"]
    (container,) = containers(PODS["esper-gateway"])
    places = {one["name"]: one["mountPath"] for one in container["volumeMounts"]}
    assert f"COLLECTOR_STATE:-{places[claim['metadata']['name']]}" in GATEWAY
    pod = PODS["esper-gateway"]["spec"]
    sleep_s = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod["terminationGracePeriodSeconds"] >= 2 * sleep_s


def test_queues_and_events_have_room_on_a_gateways_volume():
    (claim,) = CLAIMS["esper-gateway"]
    room = claim["spec"]["resources"]["requests"]["storage"]
    parsed = yaml.safe_load(GATEWAY)["exporters"]
    rotation = parsed["file/events"]["rotation"]
    events = rotation["max_megabytes"] * (rotation["max_backups"] + 1) << 20
    queues = GATEWAY.count("storage: file_storage") + GATEWAY.count("<<: *on_disk")
    assert room.endswith("Gi")
    assert queues * QUEUE_BYTES + events <= int(room.removesuffix("Gi")) << 30


def chosen(selector):
    """Names of the pods that a selector of a network policy means."""
    names = {name: pod["metadata"]["labels"] for name, pod in PODS.items()}
    wanted = selector.get("matchLabels", {})
    found = {name for name, labels in names.items() if wanted.items() <= labels.items()}
    for one in selector.get("matchExpressions", ()):
        found = {name for name in found if names[name].get(one["key"]) in one["values"]}
    return found


POLICIES = {
    name: one["spec"] for (kind, name), one in BY_NAME.items() if kind == "NetworkPolicy"
}


def test_nobody_speaks_to_anybody_unless_a_policy_says_so():
    nothing = POLICIES["nothing-but"]
    assert nothing["podSelector"] == {}
    assert {*nothing["policyTypes"]} == {"Ingress", "Egress"}
    assert not {"ingress", "egress"} & {*nothing}


WAYS = [
    ("trainer", "esper-agent", 4318),
    ("esper-tamiyo", "esper-agent", 4318),
    ("esper-agent", "esper-gateway", 4317),
    ("esper-agent", "esper-gateway", 4327),
    ("esper-gateway", "esper-tamiyo", 4317),
]


def allowed(direction, peer_key, own, other, port):
    for policy in POLICIES.values():
        if own not in chosen(policy["podSelector"]):
            continue
        for rule in policy.get(direction, ()):
            peers = [
                one["podSelector"] for one in rule.get(peer_key, ()) if "podSelector" in one
            ]
            ports = {one["port"] for one in rule.get("ports", ())} or {port}
            if port in ports and any(peer and other in chosen(peer) for peer in peers):
                return True
    return False


@pytest.mark.parametrize(("source", "target", "port"), WAYS)
def test_a_way_that_telemetry_takes_is_open_at_both_ends(source, target, port):
    assert allowed("egress", "to", source, target, port)
    assert allowed("ingress", "from", target, source, port)


def test_a_trainer_cannot_reach_a_gateway_or_a_strangers_tamiyo():
    for target in ("esper-gateway", "esper-tamiyo"):
        assert not allowed("egress", "to", "trainer", target, 4317)
