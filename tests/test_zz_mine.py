import os, subprocess, sys, time
from tests.test_client import *
from tests.test_api import rows
from sqlalchemy import text
def test_schemathesis(url, keys):
    r = subprocess.run([os.path.dirname(sys.executable)+"/schemathesis","run",url+"/openapi.json","-H",f"Authorization: Bearer {keys['admin']}","--max-examples","25","--phases","examples,coverage,fuzzing","--checks","not_a_server_error,response_schema_conformance,status_code_conformance,content_type_conformance","--request-timeout","20"],capture_output=True,text=True,timeout=420)
    print(r.stdout[-9000:], r.stderr[-2000:]); assert 0
def test_scale(database):
    from farm.api import metrics
    with transaction() as db:
        pricing.sync(db, catalog.catalog()); a=accounts.create(db,"acme")
        db.execute(text("""INSERT INTO jobs (id,account_id,status,priority,runnable,frames,currency,quoted,held)
          SELECT (lpad(to_hex(1790000000000+n),12,'0')||'7000'||'8000'||'000000000000')::uuid, :a,'active',n%10,true,1,'USD',1,1 FROM generate_series(1,200000) n"""),{"a":a.id})
        db.execute(text("INSERT INTO job_lanes (job_id,model,account_id,priority,runnable) SELECT id,'starter',account_id,priority,true FROM jobs"))
    with transaction() as db: db.execute(text("analyze"))
    for read in metrics.READINGS:
        b=time.time()
        with transaction() as db: n=len(read(db))
        print(read.__name__, time.time()-b)
    assert 0
