package translate

import (
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/tools/txtar"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/model"
	"cri-dockerd/internal/shim/annotation"
	"cri-dockerd/internal/validate"
)

var update = flag.Bool("update", false, "update the golden files")

// hosts are the engines in golden files.
var hosts = map[string]model.Host{
	"20.10": {
		EngineVersion:   "20.10.24",
		APIVersion:      "1.41",
		CgroupDriver:    "cgroupfs",
		CgroupVersion:   "1",
		Runtimes:        []string{"runc"},
		SecurityOptions: []string{"seccomp"},
		MinOOMScoreAdj:  0,
	},
	"29": {
		EngineVersion:   "29.0.0",
		CDI:             true,
		ContainerdStore: true,
		APIVersion:      "1.52",
		CgroupDriver:    "systemd",
		CgroupVersion:   "2",
		Runtimes:        []string{"crun", "runc"},
		SecurityOptions: []string{"apparmor", "seccomp", "selinux"},
		MinOOMScoreAdj:  -1000,
	},
}

// shimHost is the engine "29" with pods under the containerd shim.
const shimHost = "29 shim"

// TestGolden translates each testdata/*.txtar. Its files are "host" (a key of hosts),
// "request.json" (a RunPodSandboxRequest or CreateContainerRequest), and "docker.json" or "error"
// with the result.
// -update writes the result.
func TestGolden(t *testing.T) {
	files, err := filepath.Glob("testdata/*.txtar")
	if err != nil || len(files) < 6 {
		t.Fatalf("golden files: %v, %v", files, err)
	}

	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txtar"), func(t *testing.T) {
			a, err := txtar.ParseFile(file)
			if err != nil {
				t.Fatal(err)
			}

			in := map[string]string{}
			var input []txtar.File
			for _, f := range a.Files {
				in[f.Name] = string(f.Data)
				if f.Name == "host" || f.Name == "request.json" {
					input = append(input, f)
				}
			}

			name := strings.TrimSpace(in["host"])
			host, ok := hosts[strings.TrimSuffix(name, " shim")]
			if !ok {
				t.Fatalf("unknown host %q", in["host"])
			}

			if name == shimHost {
				host.Shim.Mode, host.Shim.OutputDirectory = "auto", "/run/cri-dockerd/exec"
			}

			part, got := translate(t, in["request.json"], host)
			if *update {
				a.Files = append(input, txtar.File{Name: part, Data: []byte(got)})
				if err := os.WriteFile(file, txtar.Format(a), 0o644); err != nil {
					t.Fatal(err)
				}
				return
			}

			if diff := cmp.Diff(in[part], got); diff != "" {
				t.Errorf("%s (-want +got):\n%s", part, diff)
			}
		})
	}
}

// translate returns the last part of a golden file: Docker's request without empty values, or the
// error.
func translate(t *testing.T, request string, h model.Host) (file, content string) {
	t.Helper()
	create := createSandbox
	if strings.Contains(request, `"pod_sandbox_id"`) {
		create = createContainer
	}

	c, err := create(t, request, h)
	if err != nil {
		return "error", err.Error() + "\n"
	}

	b, err := json.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}

	var v any
	if err := json.Unmarshal(b, &v); err != nil {
		t.Fatal(err)
	}

	if b, err = json.MarshalIndent(withoutEmpty(v), "", "  "); err != nil {
		t.Fatal(err)
	}

	return "docker.json", string(b) + "\n"
}

// createSandbox validates and translates a RunPodSandboxRequest.
func createSandbox(t *testing.T, request string, h model.Host) (*Create, error) {
	t.Helper()
	r := &runtimeapi.RunPodSandboxRequest{}
	if err := json.Unmarshal([]byte(request), r); err != nil {
		t.Fatal(err)
	}

	if err := validate.Request(r); err != nil {
		return nil, err
	}

	if err := validate.Sandbox(r, h); err != nil {
		return nil, err
	}

	o := SandboxOptions{
		Host:           h,
		Image:          model.PauseImage{Source: "pause:1", Name: "pause:1"},
		RuntimeHandler: r.RuntimeHandler,
		NetworkMode:    model.NetworkNone,
	}
	if h.Shim.IsActive() {
		o.Image.Seccomp, o.NetNS = "{}", "/run/netns/a"
	}

	return NewSandbox(r.Config, o)
}

// createContainer validates and translates a CreateContainerRequest.
func createContainer(t *testing.T, request string, h model.Host) (*Create, error) {
	t.Helper()
	r := &runtimeapi.CreateContainerRequest{}
	if err := json.Unmarshal([]byte(request), r); err != nil {
		t.Fatal(err)
	}

	if err := validate.Request(r); err != nil {
		return nil, err
	}

	sb := &model.Sandbox{
		ID:           model.ContainerID(r.PodSandboxId),
		Name:         SandboxName(r.SandboxConfig.GetMetadata()),
		Metadata:     r.SandboxConfig.GetMetadata(),
		Namespaces:   r.SandboxConfig.GetLinux().GetSecurityContext().GetNamespaceOptions(),
		CgroupParent: cgroupParent(r.SandboxConfig.GetLinux().GetCgroupParent(), h),
	}
	if h.Shim.IsActive() {
		sb.Runtime, sb.ExecOutput = annotation.Runtime, h.Shim.OutputDirectory
	}

	image := &model.Image{ID: "sha256:cafe"}
	if err := validate.Container(r.Config, sb, image, h); err != nil {
		return nil, err
	}

	return NewContainer(r.Config, r.SandboxConfig, ContainerOptions{
		Host:           h,
		Sandbox:        sb,
		Log:            model.LogConfig{Driver: "json-file"},
		Image:          image,
		SeccompProfile: "{}",
		ImageVolumes:   mountedVolumes(r.Config, h),
	})
}

// mountedVolumes returns an image volume for each mount of an image.
func mountedVolumes(cfg *runtimeapi.ContainerConfig, h model.Host) map[int]model.ImageVolume {
	volumes := map[int]model.ImageVolume{}
	for i, m := range cfg.GetMounts() {
		if m.GetImage().GetImage() == "" {
			continue
		}

		v := model.ImageVolume{
			ImageID: "sha256:beef",
			Target:  m.ContainerPath,
			SubPath: m.ImageSubPath,
		}
		if !h.NativeImageVolumes() {
			v.Path = "/run/image-volumes/beef/" + m.ImageSubPath
		}

		volumes[i] = v
	}

	return volumes
}

// withoutEmpty removes zero values except for empty lists: Docker distinguishes them from null.
func withoutEmpty(v any) any {
	m, ok := v.(map[string]any)
	if !ok {
		return v
	}

	for k, x := range m {
		x = withoutEmpty(x)
		m[k] = x
		switch y := x.(type) {
		case nil:
			delete(m, k)
		case string:
			if y == "" {
				delete(m, k)
			}

		case float64:
			if y == 0 {
				delete(m, k)
			}

		case bool:
			if !y {
				delete(m, k)
			}

		case map[string]any:
			if len(y) == 0 {
				delete(m, k)
			}
		}
	}

	return m
}
