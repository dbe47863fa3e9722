"""The benchmark of latencies prints a row per exit of every network."""


def test_a_row_for_every_exit(printed):
    words = "--models cifar_resnet msdnet_cifar_lin5 --input_size 32 --rounds 1"
    lines = printed("bench_latency", *words.split()).splitlines()
    assert [line.split()[:2] for line in lines[-6:]] == [["cifar_resnet", "0"]] + [
        ["msdnet_cifar_lin5", str(k)] for k in range(5)
    ]
