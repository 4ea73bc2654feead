package systemd

import (
	"fmt"
	"math"
	"testing"

	"github.com/google/go-cmp/cmp"

	"cri-dockerd/internal/model"
)

func TestProperties(t *testing.T) {
	for _, c := range []struct {
		key   model.UnifiedKey
		value string
		want  []Property
	}{
		{"memory.high", "104857600", []Property{{"MemoryHigh", uint64(104857600)}}},
		{"memory.high", "max\n", []Property{{"MemoryHigh", uint64(math.MaxUint64)}}},
		{"memory.high", "0", nil}, // systemd rejects it
		{"memory.high", "100M", nil},
		{"memory.min", "0", []Property{{"MemoryMin", uint64(0)}}},
		{"memory.low", "4096", []Property{{"MemoryLow", uint64(4096)}}},
		{"memory.max", "4096", []Property{{"MemoryMax", uint64(4096)}}},
		{"memory.swap.max", "0", []Property{{"MemorySwapMax", uint64(0)}}},
		{"memory.oom.group", "1", nil},
		{"memory.zswap.max", "0", nil},
		{"hugetlb.2MB.max", "0", nil},
		{"pids.max", "max", []Property{{"TasksMax", uint64(math.MaxUint64)}}},
		{"pids.max", "0", nil},
		{"cpu.weight", "200", []Property{{"CPUWeight", uint64(200)}}},
		{"cpu.weight", "max", nil},
		{"cpu.weight", "10001", nil},
		{"io.weight", "50", []Property{{"IOWeight", uint64(50)}}},
		{"io.weight", "default 50\n8:0 10", []Property{{"IOWeight", uint64(50)}}},
		{"io.weight", "8:0 10", nil},
		{"cpuset.cpus", "0-2,9", []Property{{"AllowedCPUs", []byte{0b111, 0b10}}}},
		{"cpuset.cpus", "0-99999999", nil},
		{"cpuset.cpus", "3-1", nil},
		{"cpuset.cpus", "0-3:1/2", nil},
		{"cpuset.mems", "0", []Property{{"AllowedMemoryNodes", []byte{1}}}},
		{"cpu.max", "50000 200000", []Property{
			{"CPUQuotaPerSecUSec", uint64(250000)},
			{"CPUQuotaPeriodUSec", uint64(200000)},
		}},
		{"cpu.max", "max", []Property{
			{"CPUQuotaPerSecUSec", uint64(math.MaxUint64)},
			{"CPUQuotaPeriodUSec", uint64(100000)},
		}},
		{"cpu.max", "1 0", nil},
		{"cpu.max", "", nil},
	} {
		t.Run(fmt.Sprintf("%s %q", c.key, c.value), func(t *testing.T) {
			got := Properties(map[model.UnifiedKey]string{c.key: c.value})
			if diff := cmp.Diff(c.want, got); diff != "" {
				t.Error(diff)
			}
			if len(got) > 0 && !HasProperty(c.key) {
				t.Error("HasProperty is false")
			}
		})
	}
}

// FuzzProperties: no value panics or takes much memory.
func FuzzProperties(f *testing.F) {
	for _, key := range []string{"cpuset.cpus", "cpu.max", "io.weight", "memory.high"} {
		f.Add(key, "0-3,5 100000")
	}

	f.Fuzz(func(t *testing.T, key, value string) {
		for _, p := range Properties(map[model.UnifiedKey]string{model.UnifiedKey(key): value}) {
			if b, ok := p.Value.([]byte); ok && len(b) > maxCPU/8+1 {
				t.Errorf("%d bytes for %q", len(b), value)
			}
		}
	})
}
