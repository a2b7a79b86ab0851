"""`vhs run --on ray`: units on a Ray cluster. An actor keeps its models loaded and takes one unit after the other; who is idle gets the next.

Ray only carries the work: claims, markers and failures are in the run's folder as on every backend, so an actor, a node or the whole cluster may go
at any time. A unit whose actor died is tried again elsewhere at once. The run's folder must be one that every node sees.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from dataclasses import asdict

from jobs import claim, failures, world
from jobs.config import Config
from jobs.dispatch import Outcome
from jobs.unit import Unit
from shards.storage import open_storage

LOOK_S, START_S = 5, 600  # between two looks at what nodes there are; until something begins, a cloud's first node included
ASKED = 1000  # actors at most that an autoscaler is asked to make room for: it packs them one by one
ANSWER_S = 4  # for Ray's head


class Actors:
    """The Ray cluster of RAY_ADDRESS (`ray.sbatch`, `ray job submit` and `ray exec` set it), or the one this machine belongs to."""

    def __init__(self, config: Config, most: int | None = None, runtime_env: dict | None = None):
        """`most`: actors at a time, default as many as there is room for. `runtime_env`: Ray's, of every worker."""
        reach(runtime_env)
        self._config, self._most, self._busy = config, most, set()

    def __enter__(self) -> Actors:
        return self

    def __exit__(self, *_):
        import ray

        with suppress(Exception):  # a cluster that is gone keeps no nodes
            self._wish(0)
        ray.shutdown()  # this driver's actors end with it; the cluster is somebody else's

    def run(self, url: str, config: Config, units: list[Unit], watch=None) -> Iterator[Outcome]:
        """Attempt every unit; outcomes as they come. "busy": tried later, its last worker may be dead or slow."""
        free = []
        for unit in units:
            if self._held(url, unit):
                yield Outcome(unit, "busy", "somebody else is at work on it")
            else:
                free.append(unit)
        for outcome in self._spread(url, [unit for unit in free if unit.ranks == 1]):
            yield self._noted(outcome)
        for unit in (unit for unit in free if unit.ranks > 1):
            yield self._noted(self._gang(url, unit))

    def _noted(self, outcome: Outcome) -> Outcome:
        if outcome.state == "busy":
            self._busy.add(outcome.unit.identity)
        return outcome

    def _held(self, url: str, unit: Unit) -> bool:
        """Of a unit that was busy: whether it still is. The driver looks, for actors come and go, and who sees a heart stand still must have looked before."""
        if unit.identity not in self._busy:
            return False
        storage = open_storage(url)
        for last in claim.attempts(storage, unit.identity)[-1:]:
            if claim.held(storage, last, self._config.execution.stale_s):
                return True
            if not last.how:
                claim.close(storage, last, "killed: its heart stood still")
        self._busy.discard(unit.identity)
        return False

    def _spread(self, url: str, units: list[Unit]) -> Iterator[Outcome]:
        """Units of one rank. A unit goes to an actor that has answered: one that Ray has no room for would keep it for ever."""
        import ray

        waiting, starting, idle, at_work = list(reversed(units)), {}, [], {}
        moved_s = looked_s = time.monotonic()
        room = self._room()
        self._wish(len(waiting))
        while waiting or at_work:
            wanted = max(0, min(len(waiting), room - len(at_work)))  # actors beside those at work
            del idle[wanted:]  # Ray ends them, and whoever waits for their cores gets them
            for reference in list(starting)[wanted - len(idle) :]:
                ray.kill(starting.pop(reference))
            for _ in range(wanted - len(idle) - len(starting)):
                actor = _worker(self._config, 1).remote(self._config.threads)
                starting[actor.owner.remote()] = actor
            while idle and waiting:
                (actor, who), unit = idle.pop(), waiting.pop()
                at_work[actor.attempt.remote(url, self._config.model_dump(mode="json"), asdict(unit))] = (actor, who, unit)
            ready, _ = ray.wait([*starting, *at_work], timeout=LOOK_S)
            alive = True
            for reference in ready:
                moved_s = time.monotonic()
                if reference in starting:
                    actor = starting.pop(reference)
                    if who := _answer(reference):
                        idle.append((actor, who))
                    continue
                actor, who, unit = at_work.pop(reference)
                outcome, alive = _outcome(url, unit, reference, who, self._config.execution.tries)
                if alive:
                    idle.append((actor, who))
                yield outcome
            if not alive or time.monotonic() - looked_s > LOOK_S:  # nodes come and go
                room, looked_s = self._room(), time.monotonic()
                self._wish(len(waiting) + len(at_work))
            if not at_work and time.monotonic() - moved_s > START_S:
                raise RuntimeError(f"Ray started no worker in {START_S} s: each asks for {_share(self._config, 1)}. See ray status, or ask for less (threads)")
        self._wish(0)

    def _wish(self, actors: int):
        """Tell the autoscaler, where the cluster has one, how many actors there is work for: it brings no node for what was never asked for. It keeps to the
        last word, a killed driver's too."""
        from ray.autoscaler.sdk import request_resources

        request_resources(bundles=[_share(self._config, 1)] * min(actors, self._most or ASKED, ASKED))

    def _room(self) -> int:
        """Actors that the nodes which are there now have room for, were they ours alone; one at least."""
        return max(1, min(self._most or sys.maxsize, sum(_holds(self._config, node) for node in _nodes())))

    def _gang(self, url: str, unit: Unit) -> Outcome:
        """A unit of several ranks: an agent a node, all of them there before any begins."""
        import ray
        from ray.util.placement_group import placement_group, remove_placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        nodes, each = _layout(self._config, unit.ranks)
        share = _share(self._config, each)
        group = placement_group([share] * nodes, strategy="STRICT_SPREAD")
        try:
            if not group.wait(timeout_seconds=START_S):
                return Outcome(unit, "failed", f"Ray has no {nodes} nodes free for {unit.ranks} ranks of {unit.stage}: {share} each")
            actors = [
                _worker(self._config, each, PlacementGroupSchedulingStrategy(group, n)).remote(self._config.threads) for n in range(nodes)
            ]
            times = self._config.execution.model_dump(include={"heartbeat_s", "stale_s"})
            gang = {"url": url, "name": f"ray-{unit.identity}-{time.time_ns()}", "nodes": nodes, **times}
            values, who = self._config.model_dump(mode="json"), _answer(actors[0].owner.remote())
            followers = [actor.follow.remote(gang | {"node": n}) for n, actor in enumerate(actors) if n]
            led = actors[0].attempt.remote(url, values, asdict(unit), gang | {"node": 0})
            while not (ready := ray.wait([led, *followers], timeout=1.0)[0]):
                pass
            lost = led not in ready and _failed(ready[0])
            if lost:  # a follower's node is gone, and the leader would wait for ever
                ray.kill(actors[0])
            else:
                ray.wait(followers, num_returns=len(followers), timeout=LOOK_S)  # they hear its last word
            return _outcome(url, unit, led, who, self._config.execution.tries, lost)[0]
        finally:
            remove_placement_group(group)  # and its actors with it


def reach(runtime_env: dict | None = None):
    """Join the cluster. ConnectionError where none answers: Ray itself waits for minutes for one that does not, and dies of it."""
    import ray

    address = os.environ.get("RAY_ADDRESS", "auto")
    host, _, port = address.rpartition("://")[2].rpartition(":")
    try:
        if port.isdecimal():
            socket.create_connection((host, int(port)), ANSWER_S).close()
        ray.init(address=address, log_to_driver=False, ignore_reinit_error=True, runtime_env=runtime_env)
    except OSError as error:
        raise ConnectionError(
            f"--on ray: no Ray cluster answers at RAY_ADDRESS={address} ({error}). Start one (slurm/ray.sbatch, ray up configs/ray/local.yaml) and set it"
        ) from None


def _answer(reference) -> dict | None:
    """Who an actor is that was asked (jobs.claim.owner); None if its node was lost meanwhile. RuntimeError where no actor could live."""
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.RayError as error:
        if _node_lost(str(error)):
            return None
        raise RuntimeError(f"a Ray worker ended before it had a unit: {error}") from error


def _failed(reference) -> bool:
    import ray

    try:
        ray.get(reference)
    except ray.exceptions.RayError:
        return True
    return False


def _node_lost(said: str) -> bool:
    return "node has died" in said or "node was terminated" in said


def _outcome(url: str, unit: Unit, reference, who: dict | None, tries: int, node_lost: bool = False) -> tuple[Outcome, bool]:
    """What became of an attempt by actor `who`, and whether that lives. A dead actor is a try, unless its node is lost; after `tries` the unit has failed."""
    import ray

    try:
        return Outcome(unit, *ray.get(reference)), True
    except ray.exceptions.RayError as error:
        storage, said = open_storage(url), str(error)
        cause = "its node failed" if node_lost or _node_lost(said) else "killed"
        for one in claim.attempts(storage, unit.identity):
            if who and not one.how and (one.machine, one.pid, one.started) == (who["machine"], who["pid"], who["started"]):
                claim.close(storage, one, cause)  # so that the next does not wait until it is stale
        if cause != "killed":
            return Outcome(unit, "busy", cause), False
        where = (who["node"], who["job"]) if who else ("", "")
        failure = failures.blame(storage, unit, "its Ray worker was killed: by a signal, or for its memory", *where, told=said)
        return Outcome(unit, "failed" if failure.tries >= tries else "busy", failure.reason), False


def _gpus() -> int:
    import ray

    return int(ray.cluster_resources().get("GPU", 0))


def _nodes() -> list[dict]:
    import ray

    return [node for node in ray.nodes() if node["Alive"]]


def _holds(config: Config, node: dict) -> int:
    """Ranks that `node` has room for: one a GPU, or one for each `threads` cores where no node has any."""
    held = node["Resources"]
    return int(held.get("GPU", 0)) if _gpus() else int(held.get("CPU", 0)) // config.threads


def _share(config: Config, ranks: int) -> dict[str, int]:
    """What Ray keeps for `ranks` ranks on a node."""
    return {"CPU": ranks * config.threads, **({"GPU": ranks} if _gpus() else {})}


def _layout(config: Config, ranks: int) -> tuple[int, int]:
    """(nodes, ranks on each): as few nodes as hold the same number each."""
    largest = max(_holds(config, node) for node in _nodes())
    nodes = next((n for n in range(1, ranks + 1) if ranks % n == 0 and ranks // n <= largest), ranks)
    return nodes, ranks // nodes


def _worker(config: Config, ranks: int, strategy="DEFAULT"):
    import ray

    share = _share(config, ranks)
    return ray.remote(num_cpus=share["CPU"], num_gpus=share.get("GPU", 0), scheduling_strategy=strategy)(Worker)


class Worker:
    """One process on a node, for as long as the driver lives."""

    def __init__(self, threads: int):
        world.set_environment(threads)

    def owner(self) -> dict:
        return claim.owner()

    def attempt(self, url: str, settings: dict, unit: dict, gang: dict | None = None) -> tuple[str, str]:
        """-> (state, error) of jobs.dispatch.Outcome. Here, as `gang`'s leader with several ranks."""
        from jobs.dispatch import outcome
        from jobs.gang import Gang

        with Gang(**gang, host=_address()) if gang and gang["nodes"] > 1 else nullcontext() as crew:
            done = outcome(url, Config.model_validate(settings), Unit(**unit), gang=crew)
            return done.state, done.error

    def follow(self, gang: dict):
        from jobs.attempt import as_rank
        from jobs.gang import Gang

        Gang(**gang).follow(as_rank)


def _address() -> str:
    import ray

    return ray.util.get_node_ip_address()
