"""`vhs run --on ray`: units on a Ray cluster. An actor keeps its models loaded and takes one unit after the other; who is idle gets the next.

Ray only carries the work: claims, markers and failures are in the run's folder as on every backend, so an actor, a node or the whole cluster may go
at any time. A unit whose actor died is tried again elsewhere at once. The run's folder must be one that every node sees.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import asdict

from jobs import claim, failures, world
from jobs.config import Config
from jobs.dispatch import Outcome
from jobs.unit import Unit
from shards.storage import open_storage


class Actors:
    """The Ray cluster of RAY_ADDRESS (`ray.sbatch`, `ray job submit` and `ray exec` set it), or the one this machine belongs to."""

    def __init__(self, config: Config, most: int | None = None, runtime_env: dict | None = None):
        """`most`: actors at a time, default as many as there is room for. `runtime_env`: Ray's, of every worker."""
        import ray

        address = os.environ.get("RAY_ADDRESS", "auto")
        try:
            ray.init(address=address, log_to_driver=False, ignore_reinit_error=True, runtime_env=runtime_env)
        except ConnectionError as error:
            raise ConnectionError(
                f"--on ray: no Ray cluster at {address} ({error}). Start one (slurm/ray.sbatch, ray up configs/ray/local.yaml) and set RAY_ADDRESS"
            ) from None
        self._config, self._most = config, most

    def __enter__(self) -> Actors:
        return self

    def __exit__(self, *_):
        import ray

        ray.shutdown()  # this driver's actors end with it; the cluster is somebody else's

    def run(self, url: str, config: Config, units: list[Unit], watch=None) -> Iterator[Outcome]:
        """Attempt every unit; outcomes as they come. "busy": tried later, its last worker may be dead or slow."""
        alone, together = [u for u in units if u.ranks == 1], [u for u in units if u.ranks > 1]
        yield from self._spread(url, alone)
        for unit in together:
            yield self._gang(url, unit)

    def _spread(self, url: str, units: list[Unit]) -> Iterator[Outcome]:
        import ray

        waiting, at_work, idle = list(reversed(units)), {}, []
        room = min(len(units), self._most or _slots(self._config))
        while waiting or at_work:
            while waiting and len(at_work) < room:
                actor = idle.pop() if idle else _worker(self._config, 1).remote(self._config.threads)
                unit = waiting.pop()
                at_work[actor.attempt.remote(url, self._config.model_dump(mode="json"), asdict(unit))] = (actor, unit)
            (ready, *_), _ = ray.wait(list(at_work))
            actor, unit = at_work.pop(ready)
            outcome, alive = _outcome(url, unit, ready, self._config.execution.tries)
            if alive:
                idle.append(actor)
            yield outcome

    def _gang(self, url: str, unit: Unit) -> Outcome:
        """A unit of several ranks: an agent a node, all of them there before any begins."""
        import ray
        from ray.util.placement_group import placement_group, remove_placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        nodes, each = _layout(self._config, unit.ranks)
        share = {"CPU": each * self._config.threads, **({"GPU": each} if _gpus() else {})}
        group = placement_group([share] * nodes, strategy="STRICT_SPREAD")
        try:
            if not group.wait(timeout_seconds=120):
                return Outcome(unit, "failed", f"Ray has no {nodes} nodes free for {unit.ranks} ranks of {unit.stage}: {share} each")
            actors = [
                _worker(self._config, each, PlacementGroupSchedulingStrategy(group, n)).remote(self._config.threads) for n in range(nodes)
            ]
            gang = {"url": url, "name": f"ray-{unit.identity}-{time.time_ns()}", "nodes": nodes}
            values = self._config.model_dump(mode="json")
            followers = [actor.follow.remote(gang | {"node": n}) for n, actor in enumerate(actors) if n]
            led = actors[0].attempt.remote(url, values, asdict(unit), gang | {"node": 0})
            while not (ready := ray.wait([led, *followers], timeout=1.0)[0]):
                pass
            lost = led not in ready
            if lost:  # a follower ended before its leader's word: its node is lost, and the leader would wait for ever
                ray.kill(actors[0])
            return _outcome(url, unit, led, self._config.execution.tries, lost)[0]
        finally:
            remove_placement_group(group)  # and its actors with it


def _outcome(url: str, unit: Unit, reference, tries: int, node_lost: bool = False) -> tuple[Outcome, bool]:
    """What became of an attempt, and whether its actor lives. A dead actor is a try, unless its node is lost; after `tries` the unit has failed."""
    import ray

    try:
        return Outcome(unit, *ray.get(reference)), True
    except ray.exceptions.RayError as error:
        storage, said = open_storage(url), str(error)
        cause = "its node failed" if node_lost or "node has died" in said or "node was terminated" in said else "killed"
        killed = [one for one in claim.attempts(storage, unit.identity) if not one.how][-1:]
        for one in killed:  # so that the next does not wait until it is stale
            claim.close(storage, one, cause)
        if cause != "killed":
            return Outcome(unit, "busy", cause), False
        where = (killed[0].node, killed[0].job) if killed else ("", "")
        failure = failures.blame(storage, unit, "its Ray worker was killed: by a signal, or for its memory", *where, told=said)
        return Outcome(unit, "failed" if failure.tries >= tries else "busy", failure.reason), False


def _gpus() -> int:
    import ray

    return int(ray.cluster_resources().get("GPU", 0))


def _slots(config: Config) -> int:
    """Units side by side: one a GPU, or one for each `threads` cores where there are none."""
    import ray

    return max(1, _gpus() or int(ray.cluster_resources().get("CPU", 1)) // config.threads)


def _layout(config: Config, ranks: int) -> tuple[int, int]:
    """(nodes, ranks on each): as few nodes as hold the same number each."""
    import ray

    def room(node: dict) -> int:
        held = node["Resources"]
        return int(held.get("GPU", 0)) if _gpus() else int(held.get("CPU", 0)) // config.threads

    largest = max(room(node) for node in ray.nodes() if node["Alive"])
    nodes = next((n for n in range(1, ranks + 1) if ranks % n == 0 and ranks // n <= largest), ranks)
    return nodes, ranks // nodes


def _worker(config: Config, ranks: int, strategy="DEFAULT"):
    import ray

    return ray.remote(num_cpus=ranks * config.threads, num_gpus=ranks if _gpus() else 0, scheduling_strategy=strategy)(Worker)


class Worker:
    """One process on a node, for as long as the driver lives."""

    def __init__(self, threads: int):
        world.set_environment(threads)

    def attempt(self, url: str, settings: dict, unit: dict, gang: dict | None = None) -> tuple[str, str]:
        """-> (state, error) of jobs.dispatch.Outcome. Here, as `gang`'s leader with several ranks."""
        from jobs.dispatch import outcome
        from jobs.gang import Gang

        crew = Gang(**gang, host=_address()) if gang and gang["nodes"] > 1 else None
        try:
            done = outcome(url, Config.model_validate(settings), Unit(**unit), gang=crew)
            return done.state, done.error
        finally:
            if crew:
                crew.end()

    def follow(self, gang: dict):
        from jobs.attempt import as_rank
        from jobs.gang import Gang

        Gang(**gang).follow(as_rank)


def _address() -> str:
    import ray

    return ray.util.get_node_ip_address()
