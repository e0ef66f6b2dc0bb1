import threading, time, hashlib
import pytest
from sqlalchemy import text
from farm import accounts, db as fdb, jobs, pricing, queue, ledger
from farm.accounts import Caller, Role
from farm.catalog import catalog
from farm.db import transaction
from farm.storage import image_key

def setup(n=8):
    with transaction() as db:
        pricing.sync(db, catalog())
        a = accounts.create(db, "acme")
        k, _ = accounts.issue_key(db, a)
        c = Caller(a.id, a.name, a.currency, k.id, Role.SUBMIT)
        jobs.submit(db, c, jobs.Submission(spec={"prompt": "x", "count": n, "seed": 1}))
    models = catalog().pool("starter")
    with transaction() as db:
        r = queue.claim_pack(db, models=["starter"], worker="a", limits={m.name: m.pack for m in models})
    return r[0] if isinstance(r, tuple) else r

def stored(pack, f):
    sha = hashlib.sha256(str(f.id).encode()).digest()
    return queue.StoredFrame(frame_id=f.id, job_id=f.job_id, pack_id=pack.id, key=image_key(f.account_id, sha, f.spec.format), format="png", sha256=sha, pixel_sha256=sha, bytes=10, width=64, height=64)

@pytest.mark.parametrize("what", ["extend", "release one", "reclaim", "settle half"])
def test_race(database, what):
    pack = setup()
    out = []
    def go():
        try:
            with transaction() as db:
                out.append(queue.settle(db, [stored(pack, f) for f in pack.frames], gpu_ms={pack.id: 5}))
        except Exception as e:
            out.append(e)
    with transaction() as db:
        if what == "extend":
            queue.extend(db, worker="a", packs=[pack.id])
        elif what == "release one":
            queue.release(db, [pack.id], frames=[pack.frames[0].id])
        elif what == "settle half":
            queue.settle(db, [stored(pack, f) for f in pack.frames[:4]], gpu_ms={pack.id: 5})
        else:
            db.execute(text("update packs set lease_until = clock_timestamp() - interval '1 s'")); assert queue.reclaim(db) == 1
        t = threading.Thread(target=go); t.start(); time.sleep(1)
    t.join(10)
    print(what, out)
    with transaction() as db:
        print(db.execute(text("select status, count(*) from frames group by 1")).all(), db.execute(text("select closed_at is null, outcome from packs")).all(), ledger.audit(db))
    assert not isinstance(out[0], Exception)
    with transaction() as db:
        assert ledger.audit(db) == []
        assert db.scalar(text("select count(*) from packs where closed_at is null and not exists (select from frames where pack_id=packs.id)")) == 0
