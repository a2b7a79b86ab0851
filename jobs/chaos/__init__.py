"""`vhs chaos`: the proof that nothing is lost and nothing is committed twice, whatever fails. Read in this order:

    payload.py     a run whose units have nothing of their science: everything else of it is real
    proxy.py       trouble between a worker and an object store
    observer.py    who reads all the while, and must never see anything torn
    storm.py       workers, the harm done to them, and the comparison with a run that nothing disturbed
"""
