package conformance

import (
	"fmt"
	"os"
	"runtime"
	"slices"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/test/registry"
)

func (n *node) imageStatus(t *testing.T, ref string) *runtimeapi.Image {
	t.Helper()
	r, err := n.Image.ImageStatus(t.Context(), &runtimeapi.ImageStatusRequest{Image: &runtimeapi.ImageSpec{Image: ref}})
	if err != nil {
		t.Fatalf("ImageStatus %s: %v", ref, err)
	}
	return r.Image
}

// TestImages finds an image by every form of its name.
func TestImages(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		i := n.imageStatus(t, n.image)
		if i.GetId() == "" || i.Size == 0 || len(i.RepoTags) == 0 {
			t.Fatalf("ImageStatus: %v", i)
		}

		for _, ref := range []string{i.Id, strings.TrimPrefix(i.Id, "sha256:")[:20], "docker.io/" + n.image} {
			if got := n.imageStatus(t, ref); got.GetId() != i.Id {
				t.Errorf("ImageStatus %s: %v, want image %s", ref, got, i.Id)
			}
		}

		if got := n.imageStatus(t, "not/there:1"); got != nil {
			t.Errorf("ImageStatus of a missing image: %v", got)
		}

		l, err := n.Image.ListImages(t.Context(),
			&runtimeapi.ListImagesRequest{
				Filter: &runtimeapi.ImageFilter{Image: &runtimeapi.ImageSpec{Image: n.image}},
			})
		if err != nil || len(l.Images) != 1 || l.Images[0].Id != i.Id {
			t.Errorf("ListImages by name: %v, %v", l, err)
		}
	})
}

func (n *node) imageFS(t *testing.T) (image, container *runtimeapi.FilesystemUsage) {
	t.Helper()
	fs, err := n.Image.ImageFsInfo(t.Context(), &runtimeapi.ImageFsInfoRequest{})
	if err != nil || len(fs.ImageFilesystems) != 1 || len(fs.ContainerFilesystems) != 1 {
		t.Fatalf("ImageFsInfo: %v, %v", fs, err)
	}
	return fs.ImageFilesystems[0], fs.ContainerFilesystems[0]
}

// TestImageFsInfo checks that the usage follows a pull, the writes of a container and their
// removal, and that the mount point exists.
func TestImageFsInfo(t *testing.T) {
	eachAlone(t, func(t *testing.T, n *node) {
		pod := n.podConfig(t)
		sandbox := n.runPod(t, pod)
		c := n.start(t, sandbox, pod, sh("sleep 1000"))
		var image, container *runtimeapi.FilesystemUsage
		until := func(condition string, holds func(bytes, written, files uint64) bool) {
			t.Helper()
			eventually(t, condition, func() bool {
				i, c := n.imageFS(t)
				return i.InodesUsed != nil && i.Timestamp > 0 && holds(
					i.UsedBytes.Value-image.GetUsedBytes().GetValue(),
					c.UsedBytes.Value-container.GetUsedBytes().GetValue(),
					c.InodesUsed.GetValue()-container.GetInodesUsed().GetValue())
			})
		}

		until("usage of the images", func(bytes, _, _ uint64) bool { return bytes > 1<<20 })
		image, container = n.imageFS(t)
		if _, err := os.Stat(n.own(t).Path(image.FsId.Mountpoint)); err != nil || image.InodesUsed.Value < 10 {
			t.Errorf("image file system %v: %v", image, err)
		}

		ref := n.registry(t).Add(t, "large", "1", 2, 5<<20)
		if _, err := n.pull(t.Context(), ref, nil); err != nil {
			t.Fatal(err)
		}

		n.exec(t, c, "sh", "-c", "dd if=/dev/zero of=/big bs=1M count=5; "+
			"mkdir /many; for i in $(seq 500); do : > /many/$i; done")
		until("usage after a pull and writes of a container", func(bytes, written, files uint64) bool {
			return bytes >= 10<<20 && bytes < 25<<20 && written >= 5<<20 && written < 6<<20 && files >= 502 &&
				files < 550
		})

		n.removePod(t, sandbox)
		if err := n.removeImage(t, ref); err != nil {
			t.Error(err)
		}

		eventually(t, "usage before the pull", func() bool {
			i, c := n.imageFS(t)
			return i.UsedBytes.Value <= image.UsedBytes.Value+1<<20 && c.UsedBytes.Value <= container.UsedBytes.Value
		})
	})
}

// TestImageIdentity pulls one image from two repositories. It is one image, and every call reports
// the same ID.
func TestImageIdentity(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		one, two := n.registry(t), n.registry(t)
		i := registry.Random(t, "amd64", v1.Config{User: "1234:5678", Cmd: []string{"/none"}}, 2, 1000)
		refs := []string{one.Put(t, "identity/a", "1", i), one.Put(t, "identity/a", "2", i),
			two.Put(t, "identity/b", "1", i)}
		pod := n.podConfig(t)
		sandbox := n.runPod(t, pod)
		var id string
		for _, ref := range refs {
			got, err := n.pull(t.Context(), ref, nil)
			if err != nil || id != "" && got != id {
				t.Fatalf("pull %s: %s, %v; want %s", ref, got, err, id)
			}
			id = got
		}

		digest, err := i.Digest()
		if err != nil {
			t.Fatal(err)
		}

		digests := []string{one.Host + "/identity/a@" + digest.String(), two.Host + "/identity/b@" + digest.String()}
		for _, ref := range slices.Concat(refs, digests, []string{id}) {
			got := n.imageStatus(t, ref)
			slices.Sort(got.GetRepoTags())
			slices.Sort(got.GetRepoDigests())
			if got.GetId() != id || !equalSets(got.RepoTags, refs) || !equalSets(got.RepoDigests, digests) ||
				got.Uid.GetValue() != 1234 || got.Username != "" {
				t.Errorf("ImageStatus %s: %v", ref, got)
			}
		}

		l, err := n.Image.ListImages(t.Context(), &runtimeapi.ListImagesRequest{})
		if count := countImages(l, id); err != nil || count != 1 {
			t.Errorf("ListImages has the image %d times, %v", count, err)
		}

		for j, ref := range []string{refs[0], refs[2], id} {
			cc := n.containerConfig([]string{"/none"})
			cc.Metadata.Name, cc.Image.Image = fmt.Sprint("c", j), ref
			status := n.containerStatus(t, n.create(t, sandbox, pod, cc))
			if status.ImageId != id || status.Image.Image != ref || !slices.Contains(digests, status.ImageRef) ||
				j < 2 && status.ImageRef != digests[j] {
				t.Errorf("container of %s: %v", ref, status)
			}

			list, err := n.Runtime.ListContainers(t.Context(),
				&runtimeapi.ListContainersRequest{Filter: &runtimeapi.ContainerFilter{Id: status.Id}})
			if err != nil || len(list.Containers) != 1 || list.Containers[0].ImageId != id ||
				list.Containers[0].ImageRef != status.ImageRef {
				t.Errorf("ListContainers: %v, %v", list, err)
			}
		}

		n.removePod(t, sandbox)
		if err := n.removeImage(t, id); err != nil {
			t.Errorf("RemoveImage: %v", err)
		}
	})
}

func equalSets(a, b []string) bool {
	a, b = slices.Clone(a), slices.Clone(b)
	slices.Sort(a)
	slices.Sort(b)
	return slices.Equal(a, b)
}

func countImages(l *runtimeapi.ListImagesResponse, id string) (count int) {
	for _, i := range l.GetImages() {
		if i.Id == id {
			count++
		}
	}
	return count
}

// TestMultiPlatformImage pulls an image for several platforms. The node's platform is used under
// one identity. An image without it is not found.
func TestMultiPlatformImage(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		r := n.registry(t)
		images := map[string]v1.Image{}
		for i, arch := range []string{"amd64", "arm64", "s390x"} {
			images[arch] = registry.Random(t, arch, v1.Config{User: fmt.Sprint("user-", arch)}, i+1, 1000)
		}

		index := registry.Index(t, images)
		ref := r.Put(t, "multi", "1", index)
		id, err := n.pull(t.Context(), ref, nil)
		if err != nil {
			t.Fatal(err)
		}

		digest, err := index.Digest()
		if err != nil {
			t.Fatal(err)
		}

		for _, name := range []string{ref, id, r.Host + "/multi@" + digest.String()} {
			if i := n.imageStatus(t, name); i.GetId() != id || i.Username != "user-"+runtime.GOARCH || i.Size == 0 {
				t.Errorf("ImageStatus %s: %v", name, i)
			}
		}

		if again, err := n.pull(t.Context(), r.Host+"/multi@"+digest.String(), nil); err != nil || again != id {
			t.Errorf("pull by digest: %s, %v", again, err)
		}

		delete(images, runtime.GOARCH)
		foreign := r.Put(t, "foreign", "1", registry.Index(t, images))
		if _, err := n.pull(t.Context(), foreign, nil); status.Code(err) != codes.NotFound {
			t.Errorf("pull of an image for other platforms: %v, want NotFound", err)
		}

		if err := n.removeImage(t, ref); err != nil || n.imageStatus(t, ref) != nil {
			t.Errorf("RemoveImage: %v", err)
		}
	})
}

// TestLocalImages uses images built, imported or loaded with docker. They cannot pin themselves.
func TestLocalImages(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		dir := n.tempDir(t)
		script := func(format string, args ...any) {
			t.Helper()
			docker := "docker() { command docker -H unix://" + n.own(t).Socket + ` "$@"; }; `
			n.run(t, "sh", "-ec", "cd "+dir+"; "+docker+fmt.Sprintf(format, args...))
		}

		pod := n.podConfig(t)
		sandbox := n.runPod(t, pod)
		for name, commands := range map[string]string{
			"imported": "echo imported > a; tar -c a | docker import -c 'CMD /none' - made/imported:1",
			"built": "printf 'FROM scratch\nLABEL io.cri-dockerd.pinned=true\nCMD /none\n' | " +
				"DOCKER_BUILDKIT=0 docker build -t made/built:1 -",
			"loaded": "echo loaded > b; tar -c b | docker import -c 'CMD /none' - made/loaded:1; " +
				"docker save made/loaded:1 > c; docker rmi made/loaded:1; docker load < c",
		} {
			t.Run(name, func(t *testing.T) {
				script("%s", commands)
				ref := "made/" + name + ":1"
				i := n.imageStatus(t, ref)
				if i == nil || i.Pinned {
					t.Fatalf("ImageStatus %s: %v, want an image without a pin", ref, i)
				}

				cc := n.containerConfig([]string{"/none"})
				cc.Metadata.Name, cc.Image.Image = name, ref
				if c := n.containerStatus(t, n.create(t, sandbox, pod, cc)); c.ImageId != i.Id || c.ImageRef == "" {
					t.Errorf("container of %s: %v", ref, c)
				}
			})
		}

		n.removePod(t, sandbox)
	})
}

// TestImagesChangedWithDocker tags, removes and prunes images with docker, including the image of a
// container.
func TestImagesChangedWithDocker(t *testing.T) {
	eachFresh(t, func(t *testing.T, n *node) {
		i := registry.Random(t, "amd64", v1.Config{Cmd: []string{"/none"}}, 1, 1000)
		one := n.registry(t).Put(t, "behind", "1", i)
		id, err := n.pull(t.Context(), one, nil)
		if err != nil {
			t.Fatal(err)
		}

		n.docker(t, "tag", one, "behind/two:2")
		if got := n.imageStatus(t, "behind/two:2"); got.GetId() != id {
			t.Errorf("ImageStatus of the new name: %v", got)
		}

		n.docker(t, "rmi", one)
		eventually(t, "removal of the first name", func() bool {
			return n.imageStatus(t, one) == nil && n.imageStatus(t, id) != nil
		})
		pod := n.podConfig(t)
		sandbox := n.runPod(t, pod)
		cc := n.containerConfig([]string{"/none"})
		cc.Image.Image = id
		c := n.create(t, sandbox, pod, cc)
		n.docker(t, "rmi", "-f", "behind/two:2")
		eventually(t, "removal of the second name", func() bool { return n.imageStatus(t, "behind/two:2") == nil })
		if status := n.containerStatus(t, c); status.ImageId != id {
			t.Errorf("image of the container: %v", status)
		}

		n.docker(t, "system", "prune", "-af")
		eventually(t, "removal of unused images", func() bool { return n.imageStatus(t, n.image) == nil })
		if p := n.podStatus(t, sandbox); p.State != runtimeapi.PodSandboxState_SANDBOX_READY {
			t.Errorf("sandbox after a prune: %v", p)
		}

		n.removePod(t, sandbox)
		n.docker(t, "system", "prune", "-af")
		n.removePod(t, n.runPod(t, pod))
	})
}

// TestPauseImageIsPinned checks that the sandbox image is pinned, kept while a pod uses it, and
// restored for the next pod.
func TestPauseImageIsPinned(t *testing.T) {
	eachFresh(t, func(t *testing.T, n *node) {
		cfg := n.podConfig(t)
		pod := n.runPod(t, cfg)
		l, err := n.Image.ListImages(t.Context(), &runtimeapi.ListImagesRequest{})
		if err != nil {
			t.Fatal(err)
		}

		at := slices.IndexFunc(l.Images, func(i *runtimeapi.Image) bool { return i.Pinned })
		if at < 0 {
			t.Fatalf("no pinned image among %v", l.Images)
		}

		pause := l.Images[at]
		if err := n.removeImage(t, pause.Id); status.Code(err) != codes.FailedPrecondition ||
			!strings.Contains(err.Error(), cfg.Metadata.Name) {
			t.Errorf("RemoveImage of a pod's pause image: %v", err)
		}

		n.removePod(t, pod)
		if err := n.removeImage(t, pause.Id); err != nil || n.imageStatus(t, pause.Id) != nil {
			t.Errorf("RemoveImage of the pause image: %v", err)
		}

		n.removePod(t, n.runPod(t, cfg))
	})
}

func (n *node) listImages(t *testing.T, filter string) []*runtimeapi.Image {
	t.Helper()
	l, err := n.Image.ListImages(t.Context(), &runtimeapi.ListImagesRequest{
		Filter: &runtimeapi.ImageFilter{Image: &runtimeapi.ImageSpec{Image: filter}},
	})
	if err != nil {
		t.Fatalf("ListImages %q: %v", filter, err)
	}

	return l.Images
}

// TestListImagesOfRepository selects images with patterns, like Docker's reference filter.
func TestListImagesOfRepository(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		r := n.registry(t)
		ids := map[string]string{}
		for _, name := range []string{"list/one:1", "list/one:2", "list/two:1"} {
			repository, tag, _ := strings.Cut(name, ":")
			id, err := n.pull(t.Context(), r.Add(t, repository, tag, 1, 1000), nil)
			if err != nil {
				t.Fatal(err)
			}
			ids[name] = id
		}

		for filter, want := range map[string][]string{
			"/list/one":   {"list/one:1", "list/one:2"},
			"/list/one:2": {"list/one:2"},
			"/list/one:*": {"list/one:1", "list/one:2"},
			"/list/*":     {"list/one:1", "list/one:2", "list/two:1"},
			"/*/two":      {"list/two:1"},
			"/list/o":     nil,
			"/list/none":  nil,
		} {
			t.Run(filter, func(t *testing.T) {
				var got, wanted []string
				for _, i := range n.listImages(t, r.Host+filter) {
					got = append(got, i.Id)
				}

				for _, name := range want {
					wanted = append(wanted, ids[name])
				}

				if !equalSets(got, wanted) {
					t.Errorf("images %v, want those of %v", got, want)
				}
			})
		}

		_, err := n.Image.ListImages(t.Context(), &runtimeapi.ListImagesRequest{
			Filter: &runtimeapi.ImageFilter{Image: &runtimeapi.ImageSpec{Image: "busybox["}},
		})
		if status.Code(err) != codes.InvalidArgument {
			t.Errorf("ListImages with a malformed pattern: %v, want InvalidArgument", err)
		}
	})
}
