"""THE TREE OF TASKS: opens the parts of a node, wires them, and stops them in order.

Rules: one process, one trio.run, and every long-lived task is started here or by the part named here. Stop order:
readiness goes red and the advert is withdrawn, the web refuses new work, requests in flight finish (IN_FLIGHT_S),
then web, engine, peers, host. The first SIGTERM or SIGINT stops in that order, the second at once.
Source: docs/ARCHITECTURE.md "Tree of tasks"; tests/test_run.py compares it with the live tree.
"""

from __future__ import annotations

import logging
import os
import random
import secrets
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING

import trio

from crypto.identity import Identity, PeerId
from gossip.blob_serving import ServingConfig
from gossip.blobs import Blobs, BlobsConfig
from gossip.messages import advert_topic
from gossip.round_door import RoundDoor
from gossip.rounds import round_topic
from gossip.service import GossipConfig, GossipService
from gossip.standing import Fault
from gossip.summaries import summary_topic
from node.admission import Admission
from node.backend import Backend
from node.banner import print_banner
from node.collector import importing
from node.config import KEY_FILE, NodeConfig
from node.errors import ConfigError
from node.hosting import Hosting
from node.inference import INFER_PROTOCOL, Inference
from node.loading import Loading
from node.remote import Network
from node.run_parts import announced, load_runtime
from node.sealed_relay import SealedRelay
from node.sealed_serving import SealedServing
from node.self_wiring import Keeping
from node.serving import Serving
from node.state import NodeState, Parts
from node.training_pause import PausePolicy, hours_of
from node.version import AGENT
from node.work import WORK_LIMITS
from p2p.book import Book
from p2p.bootstrap import BootstrapPeer, bootstrap_peer, read_bootstrap_file
from p2p.calls import Calls
from p2p.direct import Direct, DirectConfig
from p2p.errors import BadAddress, BadFile
from p2p.hello import RPC_PROTOCOL
from p2p.host_config import HostConfig
from p2p.peering import Peering, PeeringConfig
from p2p.reaching import Outside, Reaching
from p2p.relay import RelayLimits
from p2p.transport import Transport

if TYPE_CHECKING:
    from model.runtime_face import Runtime

IN_FLIGHT_S = 30.0
WEB_DRAIN_S = 2.0  # for the last bytes of answers, after what was in flight has ended
LAST_FRAMES_S = 0.2  # for what is written but not sent yet, to peers and clients
MEASURE_EVERY_S = 1.0
_log = logging.getLogger("node")


async def run_node(config: NodeConfig, log_left_out: Mapping[str, int]) -> None:
    """Run a node until it is told to stop. log_left_out: lines left out of the log, by logger; told in the status.

    Raises ConfigError, CannotListen, UnsafePermissions, ModelError.
    """
    with importing():
        from p2p.host import open_host  # libp2p is imported here, when the settings are known to be good

    identity = Identity.load_or_make(config.data_dir / KEY_FILE)
    bootstrap = _bootstrap(config)
    topics = topics_of(config.network)
    relay = RelayLimits() if config.relay else None
    host_config = HostConfig(listen=config.listen, psk=config.psk(), topics=topics, relay=relay)
    async with open_host(identity, host_config) as transport:
        node = Node(config, identity, transport, bootstrap, outside=transport.relay)
        node.state.log_left_out = log_left_out
        await node.run()


def topics_of(network: str) -> frozenset[str]:
    """What a node subscribes to: its host lets in no other topic."""
    return frozenset(topic(network) for topic in (advert_topic, round_topic, summary_topic))


class Node:
    """The parts of one node over a transport that is open. Make it inside trio."""

    def __init__(
        self,
        config: NodeConfig,
        identity: Identity,
        transport: Transport,
        bootstrap: tuple[BootstrapPeer, ...],
        load: Callable[[NodeConfig], Runtime] | None = None,
        *,
        outside: Outside | None = None,
    ) -> None:
        """load: what makes the runtime, in a worker thread; None: the real one, which imports torch.

        outside: None on a network where everybody reaches everybody.
        """
        self._config = config
        loading = Loading(
            model=config.model, state="loading" if config.upstream_url() is None else "waiting for its server"
        )
        self._load = load or partial(load_runtime, on_progress=loading.note)
        self._identity = identity
        self._rng = random.Random(secrets.randbits(64))
        instance = secrets.token_hex(16)
        peering_config = PeeringConfig(
            network=config.network,
            agent=AGENT,
            instance=instance,
            bootstrap=bootstrap,
            book_path=config.data_dir / "addresses.json",
            mdns=config.mdns,
        )
        gossip_config = GossipConfig(
            network=config.network,
            agent=AGENT,
            instance=instance,
            state_path=config.data_dir / "gossip.json",
            on_duplicate=_log.error,
        )
        book = Book(transport.peer_id, self._rng)
        self._peering = Peering(transport, book, peering_config, self._rng, _log.error)
        self._gossip = GossipService(transport, identity, gossip_config, self._rng)
        peering = self._peering
        self._reaching = None if outside is None else Reaching(transport, outside, peering.peers, peering.tell)
        told = {**self._peering.handlers(), **(self._reaching.handlers() if self._reaching is not None else {})}
        self._control = Calls(transport, RPC_PROTOCOL, told, self._breach)
        self._direct = Direct(transport, DirectConfig(port=config.direct_port))
        upload = ServingConfig(upload_bytes_per_s=config.upload_mb_s * 1_000_000)
        blobs_config = BlobsConfig(folder=config.data_dir / "blobs", serving=upload)
        self.blobs = Blobs(transport, self._direct, blobs_config, on_fault=self._bad_donor)  # training's, for bulk
        self._door = RoundDoor(transport, config.network, self._gossip.blame, lambda: time.time_ns() // 1_000_000)
        serving = Serving()
        sealed = SealedServing(identity, config.network)
        handlers = {**serving.handlers(), **sealed.handlers()}
        infer = Calls(transport, INFER_PROTOCOL, handlers, self._breach, WORK_LIMITS)
        network = Network(transport=transport, peering=self._peering, calls=infer, gossip=self._gossip)
        self._inference = serving.inference = Inference(network)
        self._inference.loading = None if config.model == "none" else loading
        self._network = network
        peering.keep_while(lambda peer: infer.is_busy(peer) or self.blobs.is_busy(peer) or self._door.is_member(peer))
        parts = Parts(
            config=config,
            network=network,
            inference=self._inference,
            blobs=self.blobs,
            direct=self._direct,
            relay=SealedRelay(network, self._inference, sealed),
            reaching=self._reaching,
        )
        self.state = NodeState(parts)
        self.state.control = self._control
        self._keeping = Keeping(config, identity, network, self.state) if config.memory else None

    def _breach(self, peer: PeerId, what: str) -> None:
        """A peer broke a rule of a call protocol: its standing falls."""
        self._gossip.blame(peer, Fault.MALFORMED, what)

    def _bad_donor(self, peer: PeerId, what: str, lied: bool) -> None:
        """A peer gave, or asked for, what is not in the blob, or let a fetch down."""
        self._gossip.blame(peer, Fault.MALFORMED if lied else Fault.TIMEOUT, what)

    async def run(self) -> None:
        """Run until a signal; returns after an orderly stop."""
        async with nullcontext() if self._keeping is None else self._keeping.open():
            await self._run()

    async def _run(self) -> None:
        stop, web_stop = trio.Event(), trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_signals, stop, nursery.cancel_scope, self._keeping)
            if self._keeping is not None:
                self._keeping.start(nursery)
            await nursery.start(self._control.run)
            await nursery.start(self._network.calls.run)
            await nursery.start(self._door.calls.run)
            await nursery.start(self._direct.run)
            await nursery.start(self._gossip.run)
            await nursery.start(self._peering.run, self._control)
            if self._reaching is not None:
                await nursery.start(self._reaching.run, self._control)
            async with trio.open_nursery() as front:
                if self._config.http_address() is not None:
                    self.state.http = await front.start(self._web, web_stop)
                nursery.start_soon(self._measure)
                nursery.start_soon(self.state.process.watch)
                nursery.start_soon(self._host_model, nursery)
                await stop.wait()
                await self._drain()
                web_stop.set()
            nursery.cancel_scope.cancel()

    # the model

    async def _host_model(self, nursery: trio.Nursery) -> None:
        """Load the model, host it in the nursery, and say that the node is ready. Raises ModelError."""
        if self._config.model != "none":
            self.state.phase = "loading"
            self.state.backend = backend = await self._backend()
            await nursery.start(backend.run)
            if self._inference.draining:  # told to stop meanwhile
                return
            self._inference.hosting, self._inference.loading = backend, None
            self.state.relay.begin(self.state, self._rng, self._config)
            if self._keeping is not None:
                self._keeping.hosted(nursery)
            if isinstance(backend, Hosting) and self._config.training:
                self._train(nursery)
        self.state.phase = "running"
        self._offer()
        ready = self._ready()
        with announced(self._config.ready_file, ready):
            print_banner(ready, self._config, len(self._peering.peers()))
            await trio.sleep_forever()

    async def _backend(self) -> Backend:
        """What answers here: the model, loaded, or a server behind this node. Raises ModelError, ConfigError."""
        peer, on_change = self._network.transport.peer_id, self._offer
        if self._config.upstream_url() is None:
            runtime = await trio.to_thread.run_sync(self._load, self._config, abandon_on_cancel=True)
            level = logging.WARNING if runtime.linears.problem else logging.DEBUG  # the status tells it whenever asked
            _log.log(level, "linear layers are %s", runtime.linears.told)
            keeping, config = self._keeping, self._config
            crowd = (lambda: 0.0) if keeping is None else keeping.crowd
            admission = Admission(crowd, declines=config.foresight)
            return Hosting(runtime, peer=peer, on_change=on_change, cache_mb=config.cache_mb, admission=admission)
        with importing():
            from node.upstream_start import upstream_of  # httpx

        return upstream_of(self._config, peer=peer, on_change=on_change)

    def _train(self, nursery: trio.Nursery) -> None:
        """Training, in the nursery: in the run that was wanted, or in none until the operator says so."""
        with importing():
            from node.training import Training, TrainingParts, first_wish

        config, keeping = self._config, self._keeping
        expects = (lambda: None) if keeping is None or config.train_when_busy else keeping.active
        parts = TrainingParts(
            identity=self._identity,
            network=config.network,
            transport=self._network.transport,
            peering=self._peering,
            inference=self._inference,
            blobs=self.blobs,
            door=self._door,
            folder=config.data_dir / "training",
            policy=PausePolicy(
                hours=None if config.train_hours is None else hours_of(config.train_hours),
                on_battery=config.train_on_battery,
                expects=expects,
            ),
        )
        training = Training(
            parts, None if config.train is None else first_wish(config.train, config.data, config.train_epsilon)
        )
        self.state.trains = training
        if self._keeping is not None:
            self._keeping.training = training
        nursery.start_soon(training.run)

    def _offer(self) -> None:
        self._gossip.offer(self.state.capacity())

    async def _measure(self) -> None:
        """Hand round-trip times from peering to routing, adverts' addresses and bans from gossip to peering."""
        network = self._network.transport
        learned: dict[str, int] = {}
        expelled: frozenset[str] = frozenset()
        clock_is_wrong = False
        while True:
            await trio.sleep(MEASURE_EVERY_S)
            self.state.relay.serving.tick()
            self.state.sample()
            if self._keeping is not None:
                self._keeping.look()
            problem = self.state.clock_problem()
            if problem and not clock_is_wrong:
                _log.warning("%s", problem)
            clock_is_wrong = bool(problem)
            for peer in network.peers():
                if (rtt_ms := self._peering.rtt_ms(peer)) is not None:
                    self._gossip.observations.rtt(peer, rtt_ms / 1000)
            offers = self._gossip.directory.offers(trio.current_time())
            for offer in offers:
                if learned.get(offer.peer) != offer.sequence:
                    self._peering.learn(offer.peer, offer.advert.addresses)
            learned = {offer.peer: offer.sequence for offer in offers}
            bans = self._gossip.standing.bans(trio.current_time())
            for ban in bans:
                if ban.peer not in expelled:
                    self._peering.expel(ban.peer, f"banned: {ban.reason}")
                    if self._keeping is not None:
                        self._keeping.banned(ban.peer, ban.reason)
            expelled = frozenset(ban.peer for ban in bans)

    # the door

    async def _web(self, stop: trio.Event, *, task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED) -> None:
        with importing():
            from node.web.app import build_app
            from node.web.serve import ServeLimits, serve
            from node.web.settings import web_config

        address = self._config.http_address()
        assert address is not None
        async with trio.open_nursery() as nursery:
            settings = web_config(self._config, self._network.transport.peer_id)
            app = build_app(self.state, self._rng, settings, stop=stop)
            limits = ServeLimits(drain_s_max=WEB_DRAIN_S)
            port = await nursery.start(partial(serve, app, address.host, address.port, limits=limits, stop=stop))
            host = f"[{address.host}]" if ":" in address.host else address.host
            task_status.started(f"{host}:{port}")

    def _ready(self) -> dict[str, object]:
        hosting = self._inference.hosting
        facts = None if hosting is None else hosting.runtime.facts
        return {
            "peer_id": self._network.transport.peer_id,
            "http": self.state.http,
            "listen": list(self._network.transport.addresses()),
            "pid": os.getpid(),
            "model": None if facts is None else facts.name,
            "revision": None if facts is None else facts.revision,
        }

    # the end

    async def _drain(self) -> None:
        """No new work; what runs may finish within IN_FLIGHT_S."""
        _log.info("stopping: requests in flight have %.0f s; a second signal stops at once", IN_FLIGHT_S)
        self.state.phase = "stopping"
        self._inference.draining = True
        hosting = self._inference.hosting
        if hosting is not None:
            hosting.draining = True
        await self._gossip.withdraw()
        with trio.move_on_after(IN_FLIGHT_S):
            await self._inference.wait_idle()
            if hosting is not None:
                await hosting.wait_idle()
            await trio.sleep(LAST_FRAMES_S)


async def _signals(stop: trio.Event, scope: trio.CancelScope, keeping: Keeping | None) -> None:
    """The first signal sets `stop`, the second cancels `scope`."""
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as arrivals:
        async for number in arrivals:
            if keeping is not None:
                keeping.told_to_stop(signal.Signals(number).name)
            if stop.is_set():
                _log.warning("stopping at once: requests in flight are cut")
                scope.cancel()
            stop.set()


def _bootstrap(config: NodeConfig) -> tuple[BootstrapPeer, ...]:
    """The peers of the bootstrap file and of the flags. Raises ConfigError."""
    path = config.bootstrap_path()
    try:
        listed = read_bootstrap_file(path) if path is not None else ()
        flagged = tuple(bootstrap_peer(text, "from --bootstrap") for text in config.bootstrap)
    except (BadFile, BadAddress) as exc:
        raise ConfigError(str(exc)) from exc
    return (*flagged, *listed)
