package pause

import (
	"archive/tar"
	"bytes"
	"debug/elf"
	"encoding/json"
	"errors"
	"io"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// members returns the files of a tar archive by name.
func members(t *testing.T, archive []byte) map[string][]byte {
	t.Helper()
	out := map[string][]byte{}
	for r := tar.NewReader(bytes.NewReader(archive)); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return out
		}

		if err != nil {
			t.Fatal(err)
		}

		if out[h.Name], err = io.ReadAll(r); err != nil {
			t.Fatal(err)
		}
	}
}

func TestImage(t *testing.T) {
	for arch, engineArch := range map[string]string{"amd64": "x86_64", "arm64": "aarch64"} {
		t.Run(arch, func(t *testing.T) { testImage(t, arch, engineArch) })
	}

	if _, err := New("riscv64"); err == nil || !strings.Contains(err.Error(), "--pod-infra-container-image") {
		t.Errorf("unsupported architecture: %v", err)
	}
}

func testImage(t *testing.T, arch, engineArch string) {
	img, err := New(arch)
	if err != nil {
		t.Fatal(err)
	}

	again, err := New(engineArch)
	if diff := cmp.Diff(img, again); err != nil || diff != "" {
		t.Errorf("images for %s and %s differ: %v, %s", arch, engineArch, err, diff)
	}

	ref, archive := img.Ref, img.Archive
	if tag, ok := strings.CutPrefix(ref, "cri-dockerd.local/pause:"); !ok || len(tag) != 12 {
		t.Errorf("unexpected image name %s", ref)
	}

	files := members(t, archive)
	var manifest []struct {
		Config           string
		RepoTags, Layers []string
	}

	if err := json.Unmarshal(files["manifest.json"], &manifest); err != nil {
		t.Fatal(err)
	}

	var config struct {
		Architecture string
		Config       struct {
			Entrypoint []string
			Labels     map[string]string
		}
	}

	if err := json.Unmarshal(files[manifest[0].Config], &config); err != nil {
		t.Fatal(err)
	}

	if config.Architecture != arch || len(config.Config.Labels) > 0 {
		t.Errorf("unexpected image configuration: %+v", config)
	}
	if diff := cmp.Diff([]string{ref}, manifest[0].RepoTags); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff([]string{"/pause"}, config.Config.Entrypoint); diff != "" {
		t.Error(diff)
	}
	if want := "sha256:" + strings.TrimSuffix(manifest[0].Layers[0], ".tar"); img.DiffID != want {
		t.Errorf("DiffID is %s, want %s", img.DiffID, want)
	}
	if len(members(t, files[manifest[0].Layers[0]])["pause"]) == 0 {
		t.Error("the layer has no program")
	}
}

// TestProgramsAreSafe checks the ELF headers of the programs: statically linked, and no memory both
// writable and executable.
func TestProgramsAreSafe(t *testing.T) {
	for machine, program := range map[elf.Machine][]byte{elf.EM_X86_64: amd64, elf.EM_AARCH64: arm64} {
		f, err := elf.NewFile(bytes.NewReader(program))
		if err != nil {
			t.Fatal(err)
		}

		if f.Machine != machine || f.Type != elf.ET_EXEC {
			t.Errorf("%v: %v, %v", machine, f.Machine, f.Type)
		}

		stack := false
		for _, p := range f.Progs {
			if p.Type == elf.PT_INTERP || p.Type == elf.PT_DYNAMIC {
				t.Errorf("%v is not static", machine)
			}
			if p.Flags&(elf.PF_W|elf.PF_X) == elf.PF_W|elf.PF_X {
				t.Errorf("%v: %v is writable and executable", machine, p.Type)
			}
			stack = stack || p.Type == elf.PT_GNU_STACK
		}

		if !stack {
			t.Errorf("%v: without PT_GNU_STACK the stack would be executable", machine)
		}
	}
}
