"""The W&B workspace shows what a run logs.

The workspace, the report and the sweep reach a server that stands in for W&B's.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from lightning_alrc import ALRCCallback, plot, read_spikes, replay
from lightning_alrc.wandb import CHARTS, STEP, main, metric_name, sweep, workspace
from tests.nets import NAMED_NETS, NETS, SETTINGS
from tests.offline_wandb import WANDB, finished, isolate

Fit = Callable[..., Any]
ROOT = Path(__file__).parents[1]
CREATE = ["create-workspace", "--entity", "team", "--project", "spikes"]
REPORT = ["create-report", "--entity", "team", "--project", "spikes"]

pytest.importorskip("wandb_workspaces")


def dry_run(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    main([*CREATE, "--dry-run", *arguments])
    return json.loads(capsys.readouterr().out)


def sections_of(spec: Any) -> dict[str, list[Any]]:
    """The settings of the panels by section, without the last section, which shows spikes."""
    sections = spec["section"]["panelBankConfig"]["sections"][:-1]
    return {each["name"]: [panel["config"] for panel in each["panels"]] for each in sections}


def table_of(spec: Any) -> str:
    """The name of the run's table that the last section shows."""
    section = spec["section"]["panelBankConfig"]["sections"][-1]
    assert section["name"] == "Adaptive learning rate clipping: which samples spiked"
    (panel,) = section["panels"]
    assert panel["viewType"] == "Weave"
    shown: str = panel["config"]["panel2Config"]["exp"]["fromOp"]["inputs"]["key"]["val"]
    return shown


def metrics_of(spec: Any) -> set[str]:
    """The metrics on both axes of all panels."""
    panels = [panel for section in sections_of(spec).values() for panel in section]
    return {metric for panel in panels for metric in [*panel["metrics"], panel["xAxis"]]}


# ---- what the workspace shows


def test_the_workspace_shows_what_a_real_run_logs(
    fit: Fit, namespace: str, wandb_logger: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = wandb_logger(namespace)
    fit(NETS[namespace](), ALRCCallback(**SETTINGS), logger=logger, log_every_n_steps=2)
    spec = dry_run(capsys)["spec"]
    shown = metrics_of(spec)
    assert shown == {STEP, *(metric_name("loss", name) for c in CHARTS for name in c.metrics)}
    run = finished(logger)
    assert shown <= set().union(*run.history)
    assert run.summary[table_of(spec)]["_type"] == "table-file"


def test_the_workspace_shows_what_a_real_run_logs_of_named_losses(
    fit: Fit, namespace: str, wandb_logger: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = wandb_logger(namespace)
    fit(NAMED_NETS[namespace]("matrix"), logger=logger, log_every_n_steps=2)
    spec = dry_run(capsys, "--loss", "first", "second")["spec"]
    assert len(metrics_of(spec)) == 1 + 2 * sum(len(chart.metrics) for chart in CHARTS)
    assert metrics_of(spec) <= set().union(*finished(logger).history)
    for name, section in zip(("first", "second"), sections_of(spec).items(), strict=True):
        title, panels = section
        assert title == f"Adaptive learning rate clipping: {name}"
        metrics = {metric for panel in panels for metric in panel["metrics"]}
        assert all(metric.startswith(f"alrc/{name}/") for metric in metrics)


def test_the_workspace_shows_what_a_logger_with_a_prefix_logs(
    fit: Fit, wandb_logger: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = wandb_logger(prefix="exp.1")
    fit(NAMED_NETS["pytorch_lightning"]("matrix"), logger=logger, log_every_n_steps=2)
    spec = dry_run(capsys, "--prefix", "exp.1", "--loss", "first", "second")["spec"]
    shown = metrics_of(spec)
    assert all(name == STEP or name.startswith("exp.1-alrc/") for name in shown)
    assert len(shown) == 1 + 2 * sum(len(chart.metrics) for chart in CHARTS)
    run = finished(logger)
    assert shown <= set().union(*run.history)
    assert run.summary[table_of(spec)]["_type"] == "table-file"


def test_every_panel_has_titles_and_the_training_step_as_its_axis(
    capsys: pytest.CaptureFixture[str],
) -> None:
    spec = dry_run(capsys)["spec"]
    ((title, panels),) = sections_of(spec).items()
    assert title == "Adaptive learning rate clipping"
    assert all(panel["xAxis"] == STEP == spec["section"]["settings"]["xAxis"] for panel in panels)
    assert all(panel["xAxisTitle"] == "training step" for panel in panels)
    assert all(panel["chartTitle"] and panel["yAxisTitle"] for panel in panels)
    first = panels[0]
    assert first["chartTitle"] == "Loss and the threshold above which it is clipped"
    assert first["metrics"] == ["alrc/loss", "alrc/threshold", "alrc/loss_clipped"]
    assert [panel["yLogScale"] for panel in panels] == [True] + 6 * [False]
    # Resets have their own panel: a rise by 1 would be invisible beside thousands of clips.
    assert ["alrc/resets"] in [panel["metrics"] for panel in panels]


def test_each_loss_is_shown_once_in_the_order_given(capsys: pytest.CaptureFixture[str]) -> None:
    spec = dry_run(capsys, "--loss", "b", "--loss", "loss", "b", "--name", "Mine")
    assert spec["displayName"] == "Mine"
    title = "Adaptive learning rate clipping"
    assert list(sections_of(spec["spec"])) == [f"{title}: b", title]


# ---- wrong arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--entity", "a/b"],
            r"entity must be a name of 1 to 128 characters, without / \ # ? % : and line breaks",
        ),
        (["--project", " "], "project must be a name of 1 to 128 characters"),
        (["--project", "x" * 129], "project must be a name of 1 to 128 characters"),
        (["--loss", "a/b"], "a loss's name must be a string"),
        (["--loss"], "expected at least one argument"),
        (["--name", "loss > 1"], "name must be without emoji"),
    ],
)
def test_a_wrong_name_is_told_in_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([*CREATE, "--dry-run", *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_workspace_needs_a_loss() -> None:
    with pytest.raises(ValueError, match="losses must name one loss at least"):
        workspace("team", "spikes", [])
    with pytest.raises(TypeError, match="losses must be a sequence of names, got the string"):
        workspace("team", "spikes", "generator")
    with pytest.raises(TypeError, match="losses must be a sequence of names, got 5"):
        workspace("team", "spikes", 5)  # type: ignore[arg-type]


def test_the_names_of_losses_may_be_an_array() -> None:
    losses = np.array(["generator", "critic"])
    found, expected = (workspace("team", "spikes", each) for each in (losses, losses.tolist()))
    assert [each.name for each in found.sections] == [each.name for each in expected.sections]


def test_a_prefix_must_be_a_string() -> None:
    with pytest.raises(TypeError, match="prefix must be a string, got None"):
        workspace("team", "spikes", prefix=None)  # type: ignore[arg-type]


@pytest.mark.parametrize("missing", ["wandb_workspaces", "wandb"])
def test_a_missing_extra_is_told_in_one_line(
    missing: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0].startswith("wandb")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)  # type: ignore[arg-type]
    with pytest.raises(SystemExit) as stopped:
        main([*CREATE, "--dry-run"])
    assert stopped.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert "pip install 'lightning-alrc[workspace]'" in line


def test_an_error_without_a_message_is_told_by_its_type(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def save() -> None:
        raise TimeoutError

    view = SimpleNamespace(save=save)
    monkeypatch.setattr("lightning_alrc.wandb.workspace", lambda *_: view)
    with pytest.raises(SystemExit):
        main(CREATE)
    assert capsys.readouterr().err == "error: W&B did not save the view: TimeoutError\n"


# ---- the server


class Server(ThreadingHTTPServer):
    """Stands in for W&B's server: keeps each GraphQL request, and accepts or refuses it."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.asked: list[dict[str, Any]] = []
        self.refusals: dict[str, int] = {}
        """The HTTP status of a refused query, by a word of the query."""
        self.artifact: dict[str, Any] = {}
        """An artifact of the project team/spikes, as a run logged it."""
        self.files: dict[str, bytes] = {}
        """The contents of the files to download, by path."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def answer(self, asked: dict[str, Any]) -> tuple[int, Any]:
        self.asked.append(asked)
        for word, status in self.refusals.items():
            if word in asked["query"]:
                return status, {"errors": [{"message": "permission\ndenied"}]}
        if "upsertView" in asked["query"]:
            view = {"id": "Vmlldzox", "name": asked["variables"]["name"]}
            return 200, {"data": {"upsertView": {"view": view, "inserted": True}}}
        if "upsertSweep" in asked["query"]:
            project = {"id": "1", "name": "spikes", "entity": {"id": "1", "name": "team"}}
            upserted = {"sweep": {"name": "abcd1234", "project": project}}
            return 200, {"data": {"upsertSweep": upserted | {"configValidationWarnings": []}}}
        if "ProjectInternalId" in asked["query"]:
            return 200, {"data": {"project": {"internalId": "UHJvamVjdDox"}}}
        if "GetProjects" in asked["query"]:
            page = {"pageInfo": {"endCursor": None, "hasNextPage": False}}
            project = {"id": "1", "name": "spikes", "entityName": "team", "createdAt": "2026-11-28"}
            edges = [{"cursor": "1", "node": project | {"isBenchmark": False, "user": None}}]
            return 200, {"data": {"models": page | {"edges": edges}}}
        if "Artifact" in asked["query"]:
            return 200, {"data": self.answer_of_artifact(asked["query"], asked["variables"])}
        return 200, {"data": {"viewer": {"id": "1", "entity": "team", "username": "me"}}}

    def publish(self, artifact: dict[str, Any]) -> None:
        """Offer an artifact, its files and its manifest for download."""
        self.artifact, logged, contents = artifact, artifact["manifest"], {}
        for each in logged["contents"]:
            self.files[each["path"]] = Path(each["local_path"]).read_bytes()
            contents[each["path"]] = {"digest": each["digest"], "size": int(each["size"])}
        policy, config = logged["storage_policy"], logged["storage_policy_config"]
        manifest = {"version": 1, "storagePolicy": policy, "storagePolicyConfig": config}
        self.files["manifest"] = json.dumps(manifest | {"contents": contents}).encode()

    def answer_of_artifact(self, query: str, asked: dict[str, Any]) -> dict[str, Any]:
        """The answer to one of the three queries of a download."""
        if "FetchArtifactManifest" in query:
            file = {"directUrl": f"{self.url}/manifest"}
            return {"artifact": {"currentManifest": {"file": file}}}
        if (asked["entity"], asked["project"]) != ("team", "spikes"):
            return {"project": None}
        name = self.artifact["name"]
        if "GetArtifactMembershipFileUrls" in query:
            paths = self.files.keys() - {"manifest"}
            nodes = [{"name": path, "directUrl": f"{self.url}/{path}"} for path in paths]
            page = {"pageInfo": {"endCursor": None, "hasNextPage": False}}
            files = page | {"edges": [{"node": node} for node in nodes]}
            found = {"__typename": "ArtifactSequence", "artifactMembership": {"files": files}}
            return {
                "project": {"artifactCollection": found if asked["collection"] == name else None}
            }
        if asked["name"] not in {f"{name}:{alias}" for alias in self.artifact["aliases"]}:
            return {"project": {"artifactCollectionMembership": None}}
        project = {"id": "1", "internalId": "1", "name": "spikes", "entity": {"name": "team"}}
        named = {"__typename": "ArtifactSequence", "name": name, "project": project}
        version = {"id": "1", "versionIndex": 0, "createdAt": "2026-11-28", "aliases": []}
        absent = ("description", "metadata", "historyStep", "commitHash", "updatedAt")
        logged = {
            "artifactType": {"name": self.artifact["type"]},
            "digest": self.artifact["digest"],
        }
        state = {"state": "COMMITTED", "ttlDurationSeconds": -1, "ttlIsInherited": False}
        sizes = {"tags": [], "size": 0, "fileCount": 0}
        kept = version | dict.fromkeys(absent) | logged | state | sizes
        found = version | {
            "artifactCollection": named,
            "artifact": kept | {"artifactSequence": named},
        }
        return {"project": {"artifactCollectionMembership": found}}


class Answer(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        content = self.server.files.get(self.path[1:])
        self.send(404 if content is None else 200, content or b"")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        status, answer = 404, {}
        if self.path == "/graphql":
            status, answer = self.server.answer(json.loads(body))
        self.send(status, json.dumps(answer).encode())

    def send(self, status: int, sent: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(sent)))
        self.end_headers()
        self.wfile.write(sent)

    def log_message(self, *message: Any) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    isolate(monkeypatch, tmp_path / "wandb")
    with Server() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def error_line(
    capsys: pytest.CaptureFixture[str], *arguments: str, create: Sequence[str] = CREATE
) -> str:
    """Run a command that must fail, with wandb's real client. Return its line on standard error."""
    with pytest.raises(SystemExit) as stopped:
        main([*create, *arguments])
    assert stopped.value.code == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = (line for line in printed.err.splitlines() if not line.startswith("wandb: "))
    return line


def run_program(home: Path, *command: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"HOME": str(home)}
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=180
    )


def test_a_server_gets_the_view_and_its_url_is_printed(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [sys.executable, "-m", "lightning_alrc.wandb", *CREATE]
    done = run_program(tmp_path, *command, "--loss", "loss", "generator")
    assert done.returncode == 0, done.stderr
    (sent,) = [each["variables"] for each in server.asked if "upsertView" in each["query"]]
    assert (sent["entityName"], sent["projectName"]) == ("team", "spikes")
    assert (sent["type"], sent["displayName"]) == (
        "project-view",
        "Adaptive learning rate clipping",
    )
    expected = dry_run(capsys, "--loss", "loss", "generator")["spec"]
    assert sections_of(json.loads(sent["spec"])) == sections_of(expected)
    assert table_of(json.loads(sent["spec"])) == table_of(expected)
    name = re.fullmatch("nw-(.+)-v", sent["name"])
    assert name
    assert done.stdout == f"{server.url}/team/spikes?nw={name[1]}\n"


@pytest.mark.parametrize(("word", "status"), [("viewer", 401), ("upsertView", 400)])
def test_a_refusal_of_the_server_is_told_in_one_line(
    server: Server, capsys: pytest.CaptureFixture[str], word: str, status: int
) -> None:
    server.refusals = {word: status}
    line = error_line(capsys)
    assert server.asked
    assert line.startswith("error: W&B did not save the view: ")
    assert "permission denied" in line


def test_a_server_gets_the_report_and_its_url_is_printed(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    main([*REPORT, "--loss", "loss", "generator", "--name", "Spikes"])
    assert capsys.readouterr().out == f"{server.url}/team/spikes/reports/Spikes--Vmlldzox\n"
    (sent,) = [each["variables"] for each in server.asked if "upsertView" in each["query"]]
    assert (sent["entityName"], sent["projectName"]) == ("team", "spikes")
    assert (sent["type"], sent["displayName"]) == ("runs", "Spikes")
    blocks = json.loads(sent["spec"])["blocks"]
    headings = [each["children"][0]["text"] for each in blocks if each["type"] == "heading"]
    title = "Adaptive learning rate clipping"
    assert headings == [
        title,
        f"{title}: generator",
        "Which samples spiked",
        "Settings in which the runs differ",
    ]
    grids = [each["metadata"] for each in blocks if each["type"] == "panel-grid"]
    assert len(grids) == 4
    for grid in grids:
        (runs,) = grid["runSets"]
        assert runs["project"]["name"] == "spikes"
    of_losses = [
        {
            metric
            for panel in grid["panelBankSectionConfig"]["panels"]
            for metric in panel["config"]["metrics"]
        }
        for grid in grids[:2]
    ]
    assert of_losses == [
        {metric_name(loss, metric) for chart in CHARTS for metric in chart.metrics}
        for loss in ("loss", "generator")
    ]
    (table,) = grids[2]["panelBankSectionConfig"]["panels"]
    shown = table["config"]["panel2Config"]["exp"]["fromOp"]["inputs"]["key"]["val"]
    assert shown == "alrc/spikes"


@pytest.mark.parametrize(("word", "status"), [("viewer", 401), ("upsertView", 400)])
def test_a_refusal_of_a_report_is_told_in_one_line(
    server: Server, capsys: pytest.CaptureFixture[str], word: str, status: int
) -> None:
    server.refusals = {word: status}
    line = error_line(capsys, create=REPORT)
    assert line.startswith("error: W&B did not save the report: ")


def test_a_report_needs_a_valid_title(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([*REPORT, "--name", "x" * 129])
    assert stopped.value.code == 2
    assert "name must be a title of 1 to 128 characters" in capsys.readouterr().err


# ---- a sweep

SWEEP = ["sweep-config", "--metric", "val_loss"]


def printed_sweep(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    main([*SWEEP, *arguments])
    return capsys.readouterr().out


def test_a_server_gets_the_sweep_that_is_printed(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text(printed_sweep(capsys, "--", "python", "train.py", "--epochs", "9"))
    place = ("--entity", "team", "--project", "spikes")
    done = run_program(tmp_path, *WANDB, "sweep", *place, str(file))
    assert done.returncode == 0, done.stderr
    (sent,) = [each["variables"] for each in server.asked if "upsertSweep" in each["query"]]
    assert yaml.safe_load(sent["config"]) == yaml.safe_load(file.read_text())
    assert yaml.safe_load(sent["config"]) == sweep(
        ["python", "train.py", "--epochs", "9"], "val_loss"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--values", "0", "--", "program"], "values must be positive finite numbers, got 0.0"),
        (["--values", "inf", "--", "program"], "values must be positive finite numbers, got inf"),
        ([], "the following arguments are required: command"),
    ],
)
def test_a_wrong_sweep_is_told_in_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([*SWEEP, *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_missing_api_key_is_told_in_one_line(
    server: Server,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("HOME", str(tmp_path))  # without the user's login
    line = error_line(capsys)
    assert line.startswith("error: W&B did not save the view: ")
    assert "wandb login" in line
    assert server.asked == []


def test_a_dry_run_contacts_nobody(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert dry_run(capsys)["project"] == "spikes"
    assert server.asked == []


# ---- the artifact of a run


# wandb_logger must come before server, because wandb_logger removes W&B's environment variables.
def test_the_documented_download_of_a_run_is_replayed(
    fit: Fit, wandb_logger: Any, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Still(NETS["pytorch_lightning"]):  # type: ignore[misc]
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.0)  # so the replay has the same weights

    net, logger = Still("vector"), wandb_logger()
    callback = ALRCCallback(**SETTINGS, save_batches=3)
    fit(net, callback, logger=logger)
    run_id = logger.experiment.id
    *_, last = (each for each in finished(logger).of("artifact") if each["type"] == "alrc-spikes")
    server.publish(last)

    page = (ROOT / "docs" / "dashboards.md").read_text()
    section = page.partition("### Replay from a run\n")[2].partition("\n### ")[0]
    (command,) = re.findall(r"^wandb (.+)$", section, re.MULTILINE)
    command = command.replace("ENTITY/PROJECT", "team/spikes").replace("RUN", run_id)
    reader = tmp_path / "reader"
    reader.mkdir()
    monkeypatch.delenv("WANDB_MODE")  # the mode is offline, and the download needs the server
    done = run_program(tmp_path, *WANDB, *shlex.split(command), cwd=reader)
    assert done.returncode == 0, done.stderr

    monkeypatch.chdir(reader)
    read, again, draw = re.findall(r"`([^`]+\))`", section)
    names = {"read_spikes": read_spikes, "replay": replay, "plot": plot, "net": Still("vector")}
    exec(read, names)
    spikes: Any = names["spikes"]
    assert spikes == callback.spikes
    losses = eval(again, names | {"spike": spikes[0]})["loss"]
    assert torch.equal(losses, net.seen[spikes[0].step])
    assert losses[spikes[0].sample].item() == spikes[0].loss
    assert eval(draw, names).axes


# ---- the terminal's dashboard

PATIENCE = 120.0


def wait_for(condition: Callable[[], bool], otherwise: Callable[[], str]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, otherwise()
        time.sleep(0.2)


class Terminal:
    """A terminal of a fixed size, in a tmux server of its own."""

    def __init__(self, home: Path, sockets: str) -> None:
        self.command = ["tmux", "-u", "-L", "lightning-alrc", "-f", os.devnull]
        own = {"HOME": str(home), "TMUX_TMPDIR": sockets, "LC_ALL": "C.UTF-8"}
        self.environment = os.environ | own
        self.environment.pop("TMUX", None)

    def __call__(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*self.command, *arguments],
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENCE,
        )

    def screen(self) -> str:
        return self("capture-pane", "-p").stdout


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    if shutil.which("tmux") is None:
        pytest.skip("tmux is not installed; this test runs the dashboard in it")
    # a socket's path must be short, and tmp_path may be long
    with tempfile.TemporaryDirectory(prefix="tmux-") as sockets:
        terminal = Terminal(tmp_path, sockets)
        try:
            yield terminal
        finally:
            terminal("kill-server")


def test_the_terminal_dashboard_draws_a_run(
    fit: Fit, tmp_path: Path, wandb_logger: Any, terminal: Terminal
) -> None:
    logger = wandb_logger()
    fit(NETS["pytorch_lightning"](), ALRCCallback(**SETTINGS), logger=logger, log_every_n_steps=1)
    run = finished(logger)
    status = tmp_path / "status"
    # the shell writes the dashboard's exit status to a file
    shell = ["sh", "-c", '"$@"; echo $? > "$0"', str(status)]
    dashboard = [*shell, *WANDB, "leet", "run", str(run.folder)]
    # wide enough for the charts' whole titles
    started = terminal("new-session", "-d", "-x", "360", "-y", "90", *dashboard)
    assert started.returncode == 0, started.stderr

    # The chart of the threshold is on the second page.
    shown = {*CHARTS[0].metrics, *CHARTS[1].metrics} - {"threshold"}
    charts = {metric_name("loss", metric) for metric in shown}

    def shows_the_charts() -> bool:
        screen = terminal.screen()
        titles = set(re.findall(r"[│┃](alrc/\w+)", screen))  # a chart's title follows its frame
        return charts <= titles and re.search("[\u2801-\u28ff]", screen) is not None

    wait_for(shows_the_charts, terminal.screen)
    terminal("send-keys", "q")
    wait_for(status.exists, terminal.screen)
    wait_for(lambda: status.read_text() != "", terminal.screen)
    assert status.read_text().strip() == "0"
