package translate

import (
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/moby/moby/api/types/container"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/model"
)

// TestSeccompFile checks that only the effective profile of a container is read.
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
		"string": {&runtimeapi.LinuxContainerSecurityContext{
			SeccompProfilePath: "localhost//own.json", //nolint:staticcheck // old kubelets
		}, "/own.json"},
		"both": {&runtimeapi.LinuxContainerSecurityContext{
			Seccomp:            &runtimeapi.SecurityProfile{},
			SeccompProfilePath: "localhost//own.json", //nolint:staticcheck // old kubelets
		}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := &runtimeapi.ContainerConfig{Linux: &runtimeapi.LinuxContainerConfig{SecurityContext: c.sc}}
			if got := SeccompFile(cfg); got != c.want {
				t.Errorf("SeccompFile() = %q, want %q", got, c.want)
			}
		})
	}
}

// TestUpdateMemory translates changes of memory limits and reads the result in Docker.
func TestUpdateMemory(t *testing.T) {
	const mib = 1 << 20
	for name, c := range map[string]struct {
		host                    string
		limit, swap             int64
		wantLimit, wantSwap     int64 // for Docker
		statusLimit, statusSwap int64
		warnings                int
	}{
		"unchanged":               {"29", 0, 0, 0, 0, 0, 0, 0},
		"no swap":                 {"29", 64 * mib, 0, 64 * mib, 64 * mib, 64 * mib, 64 * mib, 0},
		"unlimited swap":          {"29", 64 * mib, -1, 64 * mib, noMemoryLimit, 64 * mib, -1, 0},
		"unlimited swap, v1":      {"20.10", 64 * mib, -1, 64 * mib, noMemoryLimit, 64 * mib, -1, 0},
		"only swap":               {"29", 0, -1, 0, -1, 0, -1, 0},
		"only swap, v1":           {"20.10", 0, -1, 0, noMemoryLimit, 0, -1, 0},
		"some swap":               {"29", 64 * mib, 96 * mib, 64 * mib, 96 * mib, 64 * mib, 96 * mib, 0},
		"lifted":                  {"29", -1, 0, noMemoryLimit, -1, -1, -1, 0},
		"lifted, v1":              {"20.10", -1, 0, noMemoryLimit, noMemoryLimit, -1, -1, 0},
		"lifted both":             {"29", -1, -1, noMemoryLimit, -1, -1, -1, 0},
		"the largest":             {"29", 1<<63 - 1, 0, 1<<63 - 1, 1<<63 - 1, -1, -1, 0},
		"one byte":                {"29", 1, 0, 6 * mib, 6 * mib, 6 * mib, 6 * mib, 1},
		"below the minimum":       {"29", 6*mib - 1, 6*mib - 1, 6 * mib, 6 * mib, 6 * mib, 6 * mib, 1},
		"below the minimum, swap": {"29", 4 * mib, 8 * mib, 6 * mib, 8 * mib, 6 * mib, 8 * mib, 1},
		"the minimum":             {"29", 6 * mib, 0, 6 * mib, 6 * mib, 6 * mib, 6 * mib, 0},
	} {
		t.Run(name, func(t *testing.T) {
			u, err := NewUpdate(&runtimeapi.LinuxContainerResources{
				MemoryLimitInBytes:     c.limit,
				MemorySwapLimitInBytes: c.swap,
			}, hosts[c.host])
			if err != nil {
				t.Fatal(err)
			}

			r := u.Resources
			if r.Memory != c.wantLimit || r.MemorySwap != c.wantSwap || len(u.Warnings) != c.warnings {
				t.Errorf("memory %d, swap %d, warnings %q", r.Memory, r.MemorySwap, u.Warnings)
			}

			got := readResources(&container.HostConfig{Resources: r}, model.KernelLimits{}).Linux
			if got.MemoryLimitInBytes != c.statusLimit || got.MemorySwapLimitInBytes != c.statusSwap {
				t.Errorf("status %v", got)
			}
		})
	}
}

// TestImageVolumeRef checks that the status names a mounted image with its digest, or by its ID if
// it has none.
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
		"no digest":   {nil, id},
		"one digest":  {[]string{"data@sha256:1"}, "data@sha256:1"},
		"two digests": {[]string{"data@sha256:1", "other/data@sha256:2"}, "other/data@sha256:2"},
	} {
		t.Run(name, func(t *testing.T) {
			got := readImageVolume(NewImageVolume(m, &model.Image{ID: id, RepoDigests: c.digests}))
			want := []string{"/v", id, c.want}
			if diff := cmp.Diff(want, []string{got.ContainerPath, got.Image.Image, got.Image.ImageRef}); diff != "" {
				t.Errorf("mount (-want +got):\n%s", diff)
			}
		})
	}
}
