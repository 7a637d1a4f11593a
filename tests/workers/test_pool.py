"""Workers: the digits of one process, whatever ends, hangs or differs."""

import os
import pickle
import signal
import time
from concurrent.futures import Future, wait
from dataclasses import replace
from importlib.metadata import PackageNotFoundError

import pytest
import torch

import forked
from mlflow_soup import errors
from mlflow_soup.evaluation.evaluator import Evaluator
from mlflow_soup.evaluation.live import LiveModel
from mlflow_soup.evaluation.prepared import open_lm
from mlflow_soup.evaluation.suite import load_suite
from mlflow_soup.request.names import parse_workers
from mlflow_soup.weights.digests import digest
from mlflow_soup.weights.find import find_checkpoint
from mlflow_soup.workers import cluster
from mlflow_soup.workers.engine import Inline
from mlflow_soup.workers.open import check_workers, open_engine
from mlflow_soup.workers.pool import LONG
from mlflow_soup.workers.worker import Mixture, Source, find_here

SUITES = ("toy_letters", "toy_digits,toy_digits_bpb:bits_per_byte", "toy_spelling")


@pytest.fixture(scope="module")
def parents(checkpoints):
    return [find_checkpoint(folder, f"v{i}") for i, folder in enumerate(checkpoints, 1)]


def mix(parents, *lam):
    return Mixture(tuple(parents), tuple(map(digest, parents)), lam)


@pytest.fixture(scope="module")
def inline(parents):
    return Inline(LiveModel(parents[0]))


@pytest.fixture(autouse=True, scope="module")
def _warm():
    """Workers and commands are forked from one process; it must be the one with all imports."""
    forked.warm()


@pytest.fixture
def pool(inline, parents):
    return open_engine(inline, mix(parents[:1], 1.0), parse_workers("2"), patience=3600.0)


def ask(inline, tasks, terms="toy_letters", **more):
    suite = load_suite(terms, include_path=str(tasks))
    return Evaluator(inline.mixer.live, suite, **more)


def scores(engine, evaluator, mixture):
    answers = engine.answer(f"{mixture.lam}", evaluator, mixture)
    return repr(evaluator.evaluate(*answers.parts)), evaluator.truncated


# -- portions --------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 7, 1000])
@pytest.mark.parametrize("terms", SUITES[:2])
@pytest.mark.parametrize("more", [{}, {"max_length": 9}, {"evaluator": "lm-eval"}])
def test_answers_in_portions_give_the_digits_of_the_whole(
    inline, parents, tasks, terms, count, more
):
    evaluator, mixture = ask(inline, tasks, terms, batch_size=8, **more), mix(parents[:2], 0.3, 0.7)
    whole = scores(inline, evaluator, mixture)
    shares = evaluator.lm.portions(count)
    assert len(shares) <= count
    assert (len(shares) > 1) == (count > 1 and not more.get("evaluator"))
    frozen = pickle.loads(pickle.dumps(evaluator.lm.freeze()))
    another = open_lm(inline.mixer.live, frozen)
    inline.mixer.mix(mixture)
    parts = [pickle.loads(pickle.dumps(another.forward(share))) for share in reversed(shares)]
    assert (repr(evaluator.evaluate(*parts)), evaluator.truncated) == whole


def test_portions_cost_about_the_same(inline, tasks):
    evaluator = ask(inline, tasks, SUITES[1], batch_size=4)
    costs = []
    for share in evaluator.lm.portions(3):
        batches = [
            batch
            for portion in share
            for batch in evaluator.lm._plans[portion.kind].batches[portion.first : portion.last]
        ]
        costs.append(sum(batch.seen for batch in batches))
    assert max(costs) < 1.2 * min(costs)


# -- processes -------------------------------------------------------------------------------------


def test_two_processes_give_the_digits_of_one(inline, pool, parents, tasks):
    some = [mix(parents, 0.2, 0.3, 0.5), mix(parents[:2], 1.0, 0.0), mix(parents[1:], 0.5, 0.5)]
    evaluators = [ask(inline, tasks, terms, batch_size=8) for terms in SUITES]
    with pool:
        for evaluator in evaluators:
            for mixture in some:
                assert scores(pool, evaluator, mixture) == scores(inline, evaluator, mixture)


def test_what_is_expected_runs_beside_and_is_told_early(inline, pool, parents, tasks):
    evaluator, told = ask(inline, tasks), []
    mixtures = [mix(parents[:2], 1 - k / 10, k / 10) for k in range(4)]
    with pool:
        for number, mixture in enumerate(mixtures):
            name = f"{mixture.lam}"
            assert pool.offer(name)
            assert not pool.offer(name)
            pool.expect(name, evaluator, mixture, lambda number=number: told.append(number))
        assert not pool.offer("a fifth")
        assert scores(pool, evaluator, mixtures[3]) == scores(inline, evaluator, mixtures[3])
        while len(told) < 3:
            pool.begin()
            pool._look()
        assert sorted(told) == [0, 1, 2]
        for mixture in mixtures[:3]:
            assert scores(pool, evaluator, mixture) == scores(inline, evaluator, mixture)
        assert not pool.expects(f"{mixtures[0].lam}")


def test_an_evaluation_whose_last_two_shares_come_at_once_is_told_once(
    inline, pool, parents, tasks
):
    evaluator, mixture, told = ask(inline, tasks), mix(parents[:2], 0.5, 0.5), []
    with pool:
        start(pool)
        pool.expect("it", evaluator, mixture, lambda: told.append("it"))
        pool.begin()
        futures = [place.future for place in pool._places]
        wait(futures)
        pool._look()
        assert told == ["it"]


def test_a_weight_that_is_not_finite_fails_as_it_does_here(inline, pool, parents, tasks):
    evaluator, mixture = ask(inline, tasks), mix(parents[:2], 3e38, -3e38)
    with pool:
        said = []
        for engine in (inline, pool):
            with pytest.raises(errors.NonFiniteError) as refusal:
                scores(engine, evaluator, mixture)
            said.append(str(refusal.value))
        assert said[0] == said[1]
        good = mix(parents[:2], 0.5, 0.5)
        pool.expect(f"{mixture.lam}", evaluator, mixture, lambda: scores(pool, evaluator, mixture))
        pool.begin()  # all workers begin with what is not finite, so it arrives first
        assert scores(pool, evaluator, good) == scores(inline, evaluator, good)
        with pytest.raises(errors.NonFiniteError):  # only where this one is asked for
            scores(pool, evaluator, mixture)


def test_on_a_cpu_this_process_takes_the_threads_of_each_worker(inline, parents, tasks):
    most = len(os.sched_getaffinity(0))
    one = ask(inline, tasks).fingerprint
    torch.set_num_threads(most)
    try:
        many = ask(inline, tasks).fingerprint
        workers = parse_workers(str(most)) or pytest.skip("there is one processor")
        with open_engine(inline, mix(parents[:1], 1.0), workers, patience=60.0):
            assert torch.get_num_threads() == 1
            assert ask(inline, tasks).fingerprint == one
        assert torch.get_num_threads() == most
    finally:
        torch.set_num_threads(1)
    assert many != one  # other last digits, so no score of one passes for that of the other


def test_what_generates_text_or_leaves_its_batches_to_lm_eval_stays_whole(inline, tasks):
    whole = {terms: ask(inline, tasks, terms).lm.stays_whole for terms in SUITES}
    assert whole == dict(zip(SUITES, (False, False, True), strict=True))
    assert ask(inline, tasks, evaluator="lm-eval").lm.stays_whole
    few = ask(inline, tasks, limit=1).lm
    assert len(few.portions(2)) == 1
    assert not few.stays_whole


# -- faults ----------------------------------------------------------------------------------------


def pids(pool):
    return [place.handle._process.pid for place in pool._places]


def start(pool):
    """Wait until all workers have started: a busy machine may start one long after the other."""
    pool.begin()
    while any(place.future is not None for place in pool._places):
        pool._look()


def lives(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0] != "Z"


def test_a_killed_worker_is_replaced_and_nothing_is_lost(inline, pool, parents, tasks, caplog):
    evaluator = ask(inline, tasks)
    with pool:
        start(pool)
        first = mix(parents[:2], 0.5, 0.5)
        assert scores(pool, evaluator, first) == scores(inline, evaluator, first)
        before = pids(pool)
        for k, pid in enumerate(before):
            os.kill(pid, signal.SIGKILL)
            again = mix(parents[:2], 0.1 * k, 1 - 0.1 * k)
            assert scores(pool, evaluator, again) == scores(inline, evaluator, again)
        assert not {*before} & {*pids(pool)}
    assert "was ended by signal 9, as the system does when memory runs out; an" in caplog.text
    assert not any(map(lives, before))


def test_a_request_that_ends_two_workers_is_named(inline, pool, parents, tasks):
    evaluator, mixture = ask(inline, tasks), mix(parents[:2], 0.25, 0.75)
    with pool:
        start(pool)
        answer = pool._places[0].handle.__class__.answer

        def deadly(self, request):
            if request.lam == mixture.lam:
                os.kill(self._process.pid, signal.SIGKILL)
            return answer(self, request)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pool._places[0].handle.__class__, "answer", deadly)
            words = r"2 workers were lost while they scored λ = 0.25, 0.75"
            with pytest.raises(errors.WorkerError, match=words):
                scores(pool, evaluator, mixture)
        assert scores(pool, evaluator, mixture) == scores(inline, evaluator, mixture)


def test_a_worker_that_hangs_is_replaced(inline, pool, parents, tasks, caplog):
    evaluator, mixture = ask(inline, tasks), mix(parents[:2], 0.25, 0.75)
    with pool:
        start(pool)
        os.kill(pids(pool)[1], signal.SIGSTOP)
        place, name = pool._places[1], f"{mixture.lam}"
        pool.expect(name, evaluator, mixture, lambda: None)
        pool.begin()
        assert place.share is not None
        place.since -= pool._patience  # that long ago
        assert scores(pool, evaluator, mixture) == scores(inline, evaluator, mixture)
    assert "has not answered for 60 minutes (--worker-patience)" in caplog.text


def test_a_worker_that_does_not_start_is_told_and_then_left_out(
    inline, pool, parents, tasks, caplog
):
    evaluator, mixture = ask(inline, tasks), mix(parents[:2], 0.25, 0.75)
    begin = pool._places[0].start

    def silent():
        handle = begin()
        handle.admit = Future
        return handle

    pool._places[0].start = silent
    with pool:
        pool.begin()
        pool._places[0].since -= LONG + 1
        pool._look()
        assert "worker 1 has not started yet: look whether the machine is busy" in caplog.text
        pool._places[0].since -= pool._patience
        assert scores(pool, evaluator, mixture) == scores(inline, evaluator, mixture)
        assert pool.size == 1
    assert "has not started within 60 minutes" in caplog.text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"bits": "0"}, "the same weights give other logits there"),
        ({"environment": {"hardware": "AVX9"}}, "instead of AVX9"),
    ],
)
def test_a_worker_of_other_bits_is_refused(inline, pool, parents, tasks, change, words):
    own = pool._own()
    if "environment" in change:
        change = {"environment": own.environment | change["environment"]}
    pool._own = lambda: replace(own, **change)
    evaluator, mixture = ask(inline, tasks), mix(parents[:2], 0.5, 0.5)
    with pool:
        for _ in range(2):  # who goes on in spite of it hears it again
            with pytest.raises(errors.WorkerError, match="does not compute as") as refusal:
                scores(pool, evaluator, mixture)
            assert words in refusal.value.what


def test_the_others_go_on_without_a_worker_of_other_bits(inline, pool, parents, tasks, caplog):
    evaluator, mixture = ask(inline, tasks), mix(parents[:2], 0.5, 0.5)
    admit = pool._admit
    odd = []

    def once(handle, admission):
        odd.append(handle.words)
        admit(handle, replace(admission, bits="0") if len(odd) == 1 else admission)

    pool._admit = once
    with pool:
        assert scores(pool, evaluator, mixture) == scores(inline, evaluator, mixture)
        again = mix(parents[:2], 0.25, 0.75)
        assert scores(pool, evaluator, again) == scores(inline, evaluator, again)
        assert pool.size == 1
    assert "the other workers go on without it" in caplog.text


def test_a_parent_that_changed_is_refused(parents, folder):
    found = find_checkpoint(folder, "v1")
    source = Source("v1", "sha256:0", folder, tuple(found.stamps.items()))
    assert find_here(source).label == "v1"
    time.sleep(0.01)
    os.utime(folder / "model.safetensors")
    with pytest.raises(errors.ParentError, match="a worker does not find the files of v1"):
        find_here(source)


@pytest.mark.parametrize(
    ("nodes", "count", "share"),
    [
        ([4], 2, 2),
        ([4, 4], 2, 4),
        ([1, 1], 1, 1),
        ([4, 4, 4, 4], 2, 4),
        ([5, 3], 4, 1),
        ([3], 2, 1),
    ],
)
def test_each_worker_of_a_cluster_fits_on_one_node(nodes, count, share):
    assert cluster.largest_share(nodes, count, most=sum(nodes) // count) == share


def test_more_workers_than_processors_are_refused():
    with pytest.raises(errors.SpecError, match="4096 workers are more than the "):
        check_workers(parse_workers("4096"), torch.device("cpu"))


def test_a_gpu_that_is_named_has_no_workers():
    check_workers(None, torch.device("cuda:1"))
    with pytest.raises(errors.SpecError, match="cuda:1 names one GPU, but workers take one each"):
        check_workers(parse_workers("2"), torch.device("cuda:1"))


@pytest.mark.parametrize(
    ("installed", "words", "fix"),
    [
        (None, "Ray is not installed", "pip install 'mlflow-soup[ray]'"),
        ("2.51.1", "Ray 2.51.1 runs the code of anybody who reaches it", "ray>=2.52"),
    ],
)
def test_a_ray_that_is_missing_or_dangerous_is_told(monkeypatch, installed, words, fix):
    def version(name):
        if installed is None:
            raise PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(cluster, "version_of", version)
    with pytest.raises(errors.SpecError, match=words) as refusal:
        check_workers(parse_workers("ray:2"), torch.device("cpu"))
    assert fix in refusal.value.fix


def test_every_error_survives_the_way_between_processes():
    kinds = [k for k in vars(errors).values() if isinstance(k, type) and issubclass(k, Exception)]
    for kind in kinds:
        error = kind("what", where="where", fix="fix")
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), str(again)) == (kind, str(error))
