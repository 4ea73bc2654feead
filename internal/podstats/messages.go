package podstats

import (
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/cgroup"
	"cri-dockerd/internal/imagefs"
	"cri-dockerd/internal/model"
	"cri-dockerd/internal/stats"
)

// All messages of stats are built in this file. A kubelet uses some of their sub-messages without a
// check and crashes without them (test/answers lists them). So each constructor returns a message
// with all of these, or nil.

// newNetworkUsage returns the network of a pod. It returns nil without the default interface, since
// a kubelet uses it without a check (addCRIPodNetworkStats). During teardown, a pod's processes may
// outlive its interfaces.
func newNetworkUsage(at time.Time, devices []stats.Interface) *runtimeapi.NetworkUsage {
	out := &runtimeapi.NetworkUsage{Timestamp: at.UnixNano()}
	for _, d := range devices {
		i := &runtimeapi.NetworkInterfaceUsage{
			Name:     d.Name,
			RxBytes:  value(d.RxBytes),
			RxErrors: value(d.RxErrors),
			TxBytes:  value(d.TxBytes),
			TxErrors: value(d.TxErrors),
		}
		if d.Name == stats.DefaultInterface {
			out.DefaultInterface = i
		}

		out.Interfaces = append(out.Interfaces, i)
	}

	if out.DefaultInterface == nil {
		return nil
	}

	return out
}

// newFilesystemUsage returns the usage below a directory. inodes is nil if unknown.
func newFilesystemUsage(at time.Time, dir string, bytes uint64, inodes *uint64) *runtimeapi.FilesystemUsage {
	return &runtimeapi.FilesystemUsage{
		Timestamp:  at.UnixNano(),
		FsId:       &runtimeapi.FilesystemIdentifier{Mountpoint: dir},
		UsedBytes:  value(bytes),
		InodesUsed: optional(inodes),
	}
}

// sizesOf sums up the sizes of images as reported by the engine.
func sizesOf(images []*model.Image, dir string) imagefs.Measurement {
	m := imagefs.Measurement{At: time.Now(), ImageDir: dir, ContainerDir: dir}
	for _, i := range images {
		m.Image.Bytes += uint64(max(i.Size, 0))
	}
	return m
}

func value(n uint64) *runtimeapi.UInt64Value { return &runtimeapi.UInt64Value{Value: n} }

func optional(n *uint64) *runtimeapi.UInt64Value {
	if n == nil {
		return nil
	}
	return value(*n)
}

// unused returns the remainder of a limit, nil without a limit.
func unused(limit *uint64, used uint64) *runtimeapi.UInt64Value {
	if limit == nil {
		return nil
	}
	return value(*limit - min(*limit, used))
}

func cpuUsage(u stats.Usage) *runtimeapi.CpuUsage {
	return &runtimeapi.CpuUsage{
		Timestamp:            u.At.UnixNano(),
		UsageCoreNanoSeconds: value(u.CPU),
		UsageNanoCores:       optional(u.NanoCores),
		Psi:                  psi(u.CPUPressure),
	}
}

func memoryUsage(u stats.Usage) *runtimeapi.MemoryUsage {
	m := u.Memory
	return &runtimeapi.MemoryUsage{
		Timestamp:       u.At.UnixNano(),
		WorkingSetBytes: value(m.WorkingSet),
		AvailableBytes:  unused(m.Limit, m.WorkingSet),
		UsageBytes:      value(m.Usage),
		RssBytes:        value(m.RSS),
		PageFaults:      value(m.Faults),
		MajorPageFaults: value(m.MajorFaults),
		Psi:             psi(u.MemoryPressure),
	}
}

func swapUsage(u stats.Usage) *runtimeapi.SwapUsage {
	if u.Swap == nil {
		return nil
	}

	return &runtimeapi.SwapUsage{
		Timestamp:          u.At.UnixNano(),
		SwapUsageBytes:     value(u.Swap.Usage),
		SwapAvailableBytes: unused(u.Swap.Limit, u.Swap.Usage),
	}
}

// ioUsage returns the pressure, the only content of the message.
func ioUsage(u stats.Usage) *runtimeapi.IoUsage {
	if u.IOPressure == nil {
		return nil
	}
	return &runtimeapi.IoUsage{Timestamp: u.At.UnixNano(), Psi: psi(u.IOPressure)}
}

func psi(p *cgroup.Pressure) *runtimeapi.PsiStats {
	if p == nil {
		return nil
	}

	data := func(s cgroup.Stall) *runtimeapi.PsiData {
		return &runtimeapi.PsiData{
			Total:  uint64(s.Total.Nanoseconds()),
			Avg10:  s.Avg10,
			Avg60:  s.Avg60,
			Avg300: s.Avg300,
		}
	}

	return &runtimeapi.PsiStats{Some: data(p.Some), Full: data(p.Full)}
}
