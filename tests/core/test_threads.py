import threading

import numpy as np
import pytest
from threadpoolctl import threadpool_info

from tracin_transforms.core.threads import Threads


@pytest.mark.parametrize("count", [1, 2])
def test_results_come_in_order_and_errors_are_raised(count):
    threads = Threads(count)
    assert threads.map(lambda x: x * x, range(50)) == [x * x for x in range(50)]
    assert threads.map(str, []) == []
    with pytest.raises(ZeroDivisionError):
        threads.map(lambda x: 1 // x, [1, 0])
    threads.close()


def test_blas_has_one_thread_in_each():
    np.ones((4, 4)) @ np.ones((4, 4))
    Threads(2).close()
    pools = [pool for pool in threadpool_info() if pool["user_api"] == "blas"]
    assert pools
    assert all(pool["num_threads"] == 1 for pool in pools)


def test_little_work_is_done_by_the_caller():
    threads = Threads(2)
    names = threads.start(lambda _: threading.current_thread().name, range(4), operations=10)()
    assert {*names} == {threading.current_thread().name}
    names = threads.start(lambda _: threading.current_thread().name, range(4), operations=1e12)()
    assert threading.current_thread().name not in names
    threads.close()
