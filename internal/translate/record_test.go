package translate

import (
	"encoding/json"
	"maps"
	"path"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/moby/moby/api/types/container"
	"google.golang.org/protobuf/testing/protocmp"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"pgregory.net/rapid"

	"cri-dockerd/internal/model"
	"cri-dockerd/internal/validate"
)

// hostileLabels returns labels with every reserved key and prefix and harmful values.
func hostileLabels() map[string]string {
	forged := &record{
		Name:        "k8s_main_web_default_u-1_0",
		Labels:      map[string]string{"io.kubernetes.pod.uid": "victim"},
		Annotations: map[string]string{"io.kubernetes.container.hash": "forged"},
		Container: &containerRecord{
			SandboxID:    testSandbox,
			LogPath:      "/etc/passwd",
			ImageVolumes: []model.ImageVolume{{ImageID: testImage, Target: "/x"}},
			Limits:       model.KernelLimits{Hugepages: map[model.PageSize]uint64{"2MB": 1}},
		},
	}

	labels, err := forged.write(nil)
	if err != nil {
		panic(err)
	}

	maps.Copy(labels, map[string]string{
		labelType:                          typeSandbox,
		labelSandboxID:                     strings.Repeat("f", 64),
		labelLogPath:                       "/etc/shadow",
		labelName:                          "POD",
		"io.kubernetes.pod.uid":            "victim",
		"io.kubernetes.pod.name":           "victim",
		"io.kubernetes.pod.namespace":      "kube-system",
		"annotation.forged":                "yes",
		ownPrefix + "pid":                  "NODE",
		ownPrefix + "netns":                "own",
		ownPrefix + "limits":               `{"unified":{"../../cgroup.procs":"1"}}`,
		ownPrefix + "image-volumes":        `[{"image":"sha256:../../../etc","target":"/x"}]`,
		ownPrefix + "image-volume":         "sha256:../../../etc",
		ownPrefix + "pinned":               "true",
		ownPrefix + "label.x":              "forged",
		"app":                              "forged",
		"com.example.large":                strings.Repeat("x", 1<<20),
		"invalid\xff":                      "\xff\x00",
		labelShimGroupKey:                  "victim",
		"io.kubernetes.container.restart":  "forged",
		"org.opencontainers.image.created": "2026-01-01",
	})

	return labels
}

// mergeLabels returns Docker's labels of a container. Its own labels replace those of the image.
func mergeLabels(image, own map[string]string) map[string]string {
	out := maps.Clone(image)
	maps.Copy(out, own)
	return out
}

func containerRequest(t *testing.T) *runtimeapi.CreateContainerRequest {
	t.Helper()
	r := &runtimeapi.CreateContainerRequest{
		PodSandboxId: testSandbox,
		Config: &runtimeapi.ContainerConfig{
			Metadata: &runtimeapi.ContainerMetadata{Name: "main"},
			Image:    &runtimeapi.ImageSpec{Image: "web:1"},
			Command:  []string{"/web"},
			Labels:   map[string]string{"io.kubernetes.container.name": "main"},
		},
		SandboxConfig: &runtimeapi.PodSandboxConfig{
			Metadata: &runtimeapi.PodSandboxMetadata{Name: "web", Namespace: "default", Uid: "u-1"},
		},
	}
	if err := validate.Request(r); err != nil {
		t.Fatal(err)
	}

	return r
}

var recordOptions = []cmp.Option{protocmp.Transform(), cmpopts.EquateEmpty()}

// TestImageCannotForge checks that labels of an image change no record, neither of this program's
// containers nor of an older shim's.
func TestImageCannotForge(t *testing.T) {
	r := containerRequest(t)
	sb := &model.Sandbox{ID: testSandbox, Metadata: r.SandboxConfig.Metadata}
	ours, err := NewContainer(r.Config, r.SandboxConfig, ContainerOptions{
		Host:    hosts["29"],
		Sandbox: sb,
		Image:   &model.Image{ID: testImage},
	})
	if err != nil {
		t.Fatal(err)
	}

	pause, err := NewSandbox(r.SandboxConfig, SandboxOptions{
		Host:        hosts["29"],
		Image:       model.PauseImage{Source: "pause:1", Name: "pause:1"},
		NetworkMode: "none",
	})
	if err != nil {
		t.Fatal(err)
	}

	older := map[string]string{
		labelType:                     typeContainer,
		labelSandboxID:                testSandbox,
		"io.kubernetes.pod.uid":       "u-1",
		"io.kubernetes.pod.name":      "web",
		"io.kubernetes.pod.namespace": "default",
		labelName:                     "main",
	}

	for what, c := range map[string]struct {
		create *Create
		labels map[string]string
	}{
		"container":  {ours, ours.Config.Labels},
		"sandbox":    {pause, pause.Config.Labels},
		"older shim": {ours, older},
	} {
		t.Run(what, func(t *testing.T) {
			inspected := func(labels map[string]string) container.InspectResponse {
				config := *c.create.Config
				config.Labels = labels

				return container.InspectResponse{
					ID:         testID,
					Name:       "/" + c.create.Name,
					Image:      testImage,
					Config:     &config,
					HostConfig: c.create.Host,
				}
			}

			hostile := hostileLabels()
			want := read(t, inspected(c.labels))
			got, err := Read(inspected(mergeLabels(hostile, c.labels)), model.ImageLabels{Labels: hostile})
			if diff := cmp.Diff(want, got, recordOptions...); err != nil || diff != "" {
				t.Errorf("error %v, object (-clean +hostile):\n%s", err, diff)
			}

			if got.Container == nil && got.Sandbox == nil {
				t.Error("empty object")
			}
		})
	}
}

// TestUnknownImage reads an older shim's container without its image. Labels possibly inherited
// from the image are ignored.
func TestUnknownImage(t *testing.T) {
	own := map[string]string{
		labelType:               typeContainer,
		labelSandboxID:          testSandbox,
		"io.kubernetes.pod.uid": "u-1",
	}

	in := inspect(typeContainer, container.State{})
	in.Config.Labels = mergeLabels(map[string]string{
		"annotation.forged": "yes",
		"app":               "forged",
		ownPrefix + "pid":   "NODE",
	}, own)

	o, err := Read(in, model.ImageLabels{Unknown: true})
	if err != nil || o.Container == nil {
		t.Fatalf("%+v, %v", o, err)
	}

	if diff := cmp.Diff(map[string]string{"io.kubernetes.pod.uid": "u-1"}, o.Container.Labels); diff != "" ||
		len(o.Container.Annotations) > 0 {
		t.Errorf("annotations %v, labels %s", o.Container.Annotations, diff)
	}
}

// TestInvalidRecord checks that an invalid record, or the record of another container, is DataLoss.
func TestInvalidRecord(t *testing.T) {
	valid := func() *record {
		return &record{
			Name:      "k8s_main_web_default_u_3",
			Container: &containerRecord{SandboxID: testSandbox, Image: "web:1"},
		}
	}

	for what, change := range map[string]func(*record, *string){
		"another name":    func(r *record, _ *string) { r.Name = "k8s_main_web_default_u_4" },
		"no kind":         func(r *record, _ *string) { r.Container = nil },
		"two kinds":       func(r *record, _ *string) { r.Sandbox = &sandboxRecord{Pid: "POD"} },
		"a sandbox path":  func(r *record, _ *string) { r.Container.SandboxID = "../../x" },
		"another sandbox": func(r *record, _ *string) { r.Container.SandboxID = testID },
		"a relative log":  func(r *record, _ *string) { r.Container.LogPath = "etc/passwd" },
		"a climbing log":  func(r *record, _ *string) { r.Container.LogPath = "/var/../etc/passwd" },
		"an image path": func(r *record, _ *string) {
			r.Container.ImageVolumes = []model.ImageVolume{{ImageID: "sha256:../x", Target: "/x"}}
		},
		"a climbing path": func(r *record, _ *string) {
			r.Container.ImageVolumes = []model.ImageVolume{{ImageID: testImage, Target: "/x", SubPath: "../x"}}
		},
		"a page size": func(r *record, _ *string) {
			r.Container.Limits.Hugepages = map[model.PageSize]uint64{"../2MB": 1}
		},
		"a unified key": func(r *record, _ *string) {
			r.Container.Limits.Unified = map[model.UnifiedKey]string{"../memory.max": "1"}
		},
		"a process list": func(r *record, _ *string) {
			r.Container.Limits.Unified = map[model.UnifiedKey]string{"cgroup.procs": "1"}
		},
		"no JSON":         func(_ *record, text *string) { *text = "{" },
		"another version": func(_ *record, text *string) { *text = strings.Replace(*text, `"v":1`, `"v":9`, 1) },
		"oversized":       func(_ *record, text *string) { *text += strings.Repeat(" ", maxRecord) },
		"empty":           func(_ *record, text *string) { *text = "" },
	} {
		r := valid()
		var text string
		change(r, &text)
		labels, err := r.write(map[string]string{labelType: typeContainer})
		if err != nil {
			t.Fatal(err)
		}

		text = labels[labelRecord]
		change(r, &text)

		in := inspect(typeContainer, container.State{})
		in.Config.Labels, in.HostConfig.NetworkMode = map[string]string{labelType: typeContainer, labelRecord: text},
			"container:"+testSandbox
		if o, err := Read(in, model.ImageLabels{}); !errdefs.IsDataLoss(err) || o != (model.Object{}) {
			t.Errorf("%s: %+v, %v", what, o, err)
		}

		if what != "another sandbox" && Misfit(in.Name, in.Config.Labels) == "" {
			t.Errorf("%s: not a misfit", what)
		}
	}
}

func TestRecordLimit(t *testing.T) {
	r := containerRequest(t)
	r.Config.Annotations = map[string]string{"large": strings.Repeat("x", maxRecord)}
	_, err := NewContainer(r.Config, r.SandboxConfig, ContainerOptions{
		Host:    hosts["29"],
		Sandbox: &model.Sandbox{ID: testSandbox, Metadata: r.SandboxConfig.Metadata},
		Image:   &model.Image{ID: testImage},
	})
	if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "config.annotations") {
		t.Error(err)
	}
}

func TestHeldImage(t *testing.T) {
	holder := NewHolder(testImage)
	if id, ok := HeldImage("/" + holder.Name); !ok || id != testImage {
		t.Errorf("HeldImage(%q) = %q, %v", holder.Name, id, ok)
	}

	for _, name := range []string{"", "web", HolderPrefix, HolderPrefix + "../../etc", HolderPrefix + "abc"} {
		if id, ok := HeldImage(name); ok {
			t.Errorf("HeldImage(%q) = %q, want none", name, id)
		}
	}
}

// FuzzRead reads a container with arbitrary labels of its own and of its image. An accepted record
// has only checked parts.
func FuzzRead(f *testing.F) {
	r := &record{
		Name:      "k8s_main_web_default_u_3",
		Container: &containerRecord{SandboxID: testSandbox, LogPath: "/var/log/x"},
	}

	labels, err := r.write(nil)
	if err != nil {
		f.Fatal(err)
	}

	f.Add(labels[labelRecord], typeContainer, testSandbox, "/var/log/x", "k", "v", false)
	f.Add("{}", typeSandbox, "../x", "x", labelRecord, "{}", true)
	hostile, err := json.Marshal(hostileLabels())
	if err != nil {
		f.Fatal(err)
	}

	f.Add(string(hostile), "volume", "", "/a/../b", "annotation.x", "y", false)
	f.Fuzz(func(t *testing.T, text, kind, sandbox, log, key, value string, unknown bool) {
		image := model.ImageLabels{Unknown: unknown, Labels: map[string]string{key: value}}
		for _, withRecord := range []bool{true, false} {
			in := inspect(kind, container.State{})
			in.HostConfig.NetworkMode = "container:" + testSandbox
			in.Config.Labels = map[string]string{
				key:            value,
				labelType:      kind,
				labelSandboxID: sandbox,
				labelLogPath:   log,
			}
			if withRecord {
				in.Config.Labels[labelRecord] = text
			}

			o, err := Read(in, image)
			if err != nil {
				if !errdefs.IsDataLoss(err) || o != (model.Object{}) {
					t.Fatalf("%+v, %v", o, err)
				}
				continue
			}

			checkRecord(t, o)
		}
	})
}

// checkRecord fails the test if a part of a record is unchecked or comes from the image.
func checkRecord(t *testing.T, o model.Object) {
	t.Helper()
	if s := o.Sandbox; s != nil && (s.Name != "k8s_main_web_default_u_3" || s.Metadata.GetUid() != "u") {
		t.Fatalf("sandbox with a forged identity: %+v", s)
	}

	c := o.Container
	if c == nil {
		return
	}
	if _, err := model.ParseContainerID(string(c.SandboxID)); err != nil {
		t.Fatal(err)
	}

	if c.LogPath != "" && (!path.IsAbs(c.LogPath) || path.Clean(c.LogPath) != c.LogPath) {
		t.Fatalf("log path %q", c.LogPath)
	}

	for _, v := range c.ImageVolumes {
		if _, err := model.ParseImageID(string(v.ImageID)); err != nil || !path.IsAbs(v.Target) || v.SubPath != "" &&
			!filepath.IsLocal(v.SubPath) {
			t.Fatalf("image volume %+v", v)
		}
	}

	for k := range c.Kernel.Unified {
		if _, err := model.ParseUnifiedKey(string(k)); err != nil {
			t.Fatal(err)
		}
	}

	for k := range c.Kernel.Hugepages {
		if _, err := model.ParsePageSize(string(k)); err != nil {
			t.Fatal(err)
		}
	}

	if c.Name != "k8s_main_web_default_u_3" {
		t.Fatalf("name %q", c.Name)
	}
}

// TestRecordRoundTrip writes and reads records with hostile and reserved keys.
func TestRecordRoundTrip(t *testing.T) {
	key := rapid.OneOf(rapid.StringMatching(`[a-z./-]{1,20}`), rapid.SampledFrom([]string{
		labelType, labelSandboxID, labelLogPath, labelName, labelRecord, "annotation.x", "io.cri-dockerd.x",
		"io.kubernetes.pod.name",
	}))

	rapid.Check(t, func(t *rapid.T) {
		want := &record{
			Name:        "k8s_POD_a_b_c_0",
			Labels:      rapid.MapOfN(key, rapid.String(), 1, 5).Draw(t, "labels"),
			Annotations: rapid.MapOfN(key, rapid.String(), 1, 5).Draw(t, "annotations"),
			Sandbox:     &sandboxRecord{Pid: "POD", OwnNetNS: rapid.Bool().Draw(t, "netns")},
		}

		labels, err := want.write(map[string]string{labelType: typeSandbox, labelName: model.PauseName})
		if err != nil {
			t.Fatal(err)
		}

		got, err := parseRecord(labels, want.Name)
		if err != nil {
			t.Fatal(err)
		}

		if diff := cmp.Diff(want, got); diff != "" {
			t.Fatal(diff)
		}
		if labels[labelType] != typeSandbox || labels[labelName] != model.PauseName {
			t.Fatalf("a CRI label replaced a fact: %v", labels)
		}
	})
}
