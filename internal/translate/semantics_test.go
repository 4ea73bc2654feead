package translate

import (
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/moby/moby/api/types/container"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/model"
)

// TestSeccompFile: a profile on the node is read only for a container that it applies to.
func TestSeccompFile(t *testing.T) {
	local := &runtimeapi.SecurityProfile{
		ProfileType:  runtimeapi.SecurityProfile_Localhost,
		LocalhostRef: "localhost//own.json",
	}

	for name, c := range map[string]struct {
		sc   *runtimeapi.LinuxContainerSecurityContext
		want string
	}{
		"none":       {nil, ""},
		"profile":    {&runtimeapi.LinuxContainerSecurityContext{Seccomp: local}, "/own.json"},
		"privileged": {&runtimeapi.LinuxContainerSecurityContext{Seccomp: local, Privileged: true}, ""},
		"string": {&runtimeapi.LinuxContainerSecurityContext{SeccompProfilePath: "localhost//own.json"},
			"/own.json"}, //nolint:staticcheck // old kubelets
		"both": {&runtimeapi.LinuxContainerSecurityContext{
			Seccomp:            &runtimeapi.SecurityProfile{},
			SeccompProfilePath: "localhost//own.json", //nolint:staticcheck // old kubelets
		}, ""},
	} {
		if got := SeccompFile(&runtimeapi.ContainerConfig{
			Linux: &runtimeapi.LinuxContainerConfig{SecurityContext: c.sc},
		}); got != c.want {
			t.Errorf("%s: %q, want %q", name, got, c.want)
		}
	}
}

// TestUpdateMemory translates changes of memory limits, and reads back what Docker keeps of them.
func TestUpdateMemory(t *testing.T) {
	const mib = 1 << 20
	for name, c := range map[string]struct {
		host                    string
		limit, swap             int64
		wantLimit, wantSwap     int64 // for Docker
		statusLimit, statusSwap int64
		warnings                int
	}{
		"unchanged":         {"29", 0, 0, 0, 0, 0, 0, 0},
		"no swap":           {"29", 64 * mib, 0, 64 * mib, 64 * mib, 64 * mib, 64 * mib, 0},
		"any swap":          {"29", 64 * mib, -1, 64 * mib, noMemoryLimit, 64 * mib, -1, 0},
		"any swap, v1":      {"20.10", 64 * mib, -1, 64 * mib, noMemoryLimit, 64 * mib, -1, 0},
		"only swap":         {"29", 0, -1, 0, -1, 0, -1, 0},
		"only swap, v1":     {"20.10", 0, -1, 0, noMemoryLimit, 0, -1, 0},
		"some swap":         {"29", 64 * mib, 96 * mib, 64 * mib, 96 * mib, 64 * mib, 96 * mib, 0},
		"lifted":            {"29", -1, 0, noMemoryLimit, -1, -1, -1, 0},
		"lifted, v1":        {"20.10", -1, 0, noMemoryLimit, noMemoryLimit, -1, -1, 0},
		"lifted both":       {"29", -1, -1, noMemoryLimit, -1, -1, -1, 0},
		"the largest":       {"29", 1<<63 - 1, 0, 1<<63 - 1, 1<<63 - 1, -1, -1, 0},
		"one byte":          {"29", 1, 0, 6 * mib, 6 * mib, 6 * mib, 6 * mib, 1},
		"below the minimum": {"29", 6*mib - 1, 6*mib - 1, 6 * mib, 6 * mib, 6 * mib, 6 * mib, 1},
		"little and swap":   {"29", 4 * mib, 8 * mib, 6 * mib, 8 * mib, 6 * mib, 8 * mib, 1},
		"the minimum":       {"29", 6 * mib, 0, 6 * mib, 6 * mib, 6 * mib, 6 * mib, 0},
	} {
		u, err := NewUpdate(&runtimeapi.LinuxContainerResources{
			MemoryLimitInBytes:     c.limit,
			MemorySwapLimitInBytes: c.swap,
		}, hosts[c.host])
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}

		if u.Resources.Memory != c.wantLimit || u.Resources.MemorySwap != c.wantSwap || len(u.Warnings) != c.warnings {
			t.Errorf("%s: memory %d, swap %d, warnings %q", name, u.Resources.Memory, u.Resources.MemorySwap,
				u.Warnings)
		}

		got := readResources(&container.HostConfig{Resources: u.Resources}, model.KernelLimits{}).Linux
		if got.MemoryLimitInBytes != c.statusLimit || got.MemorySwapLimitInBytes != c.statusSwap {
			t.Errorf("%s: status %v", name, got)
		}
	}
}

// TestImageVolumeRef: the status names a mounted image with its digest, or by its ID if it has
// none.
func TestImageVolumeRef(t *testing.T) {
	const id = "sha256:beef"
	m := &runtimeapi.Mount{
		ContainerPath: "/a/../v/",
		Image:         &runtimeapi.ImageSpec{Image: id, UserSpecifiedImage: "other/data:1"},
	}

	for name, c := range map[string]struct {
		digests []string
		want    string
	}{
		"without a digest": {nil, id},
		"with one":         {[]string{"data@sha256:1"}, "data@sha256:1"},
		"in two":           {[]string{"data@sha256:1", "other/data@sha256:2"}, "other/data@sha256:2"},
	} {
		got := readImageVolume(NewImageVolume(m, &model.Image{ID: id, RepoDigests: c.digests}))
		want := []string{"/v", id, c.want}
		if diff := cmp.Diff(want, []string{got.ContainerPath, got.Image.Image, got.Image.ImageRef}); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
	}
}
