package conformance

import (
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func (n *node) imageStatus(t *testing.T, ref string) *runtimeapi.Image {
	t.Helper()
	r, err := n.Image.ImageStatus(t.Context(), &runtimeapi.ImageStatusRequest{Image: &runtimeapi.ImageSpec{Image: ref}})
	if err != nil {
		t.Fatalf("ImageStatus %s: %v", ref, err)
	}
	return r.Image
}

func TestImages(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		i := n.imageStatus(t, n.image)
		if i.GetId() == "" || i.Size == 0 || len(i.RepoTags) == 0 {
			t.Fatalf("ImageStatus: %v", i)
		}
		for _, ref := range []string{i.Id, strings.TrimPrefix(i.Id, "sha256:")[:20], "docker.io/" + n.image} {
			if got := n.imageStatus(t, ref); got.GetId() != i.Id {
				t.Errorf("%s: %v", ref, got)
			}
		}
		if got := n.imageStatus(t, "not/there:1"); got != nil {
			t.Errorf("an image that is not there: %v", got)
		}
		l, err := n.Image.ListImages(t.Context(), &runtimeapi.ListImagesRequest{Filter: &runtimeapi.ImageFilter{Image: &runtimeapi.ImageSpec{Image: n.image}}})
		if err != nil || len(l.Images) != 1 || l.Images[0].Id != i.Id {
			t.Errorf("ListImages by name: %v, %v", l, err)
		}
		fs, err := n.Image.ImageFsInfo(t.Context(), &runtimeapi.ImageFsInfoRequest{})
		if err != nil || len(fs.ImageFilesystems) != 1 || fs.ImageFilesystems[0].UsedBytes.GetValue() == 0 || fs.ImageFilesystems[0].FsId.GetMountpoint() == "" {
			t.Errorf("ImageFsInfo: %v, %v", fs, err)
		}
	})
}

// TestImagesBehindOurBack tags and removes an image with docker, and removes one with two names through the CRI.
func TestImagesBehindOurBack(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		id := strings.TrimSpace(n.run(t, "sh", "-c", "echo x > "+n.own(t).Dir+"/x-"+t.Name()[len(t.Name())-2:]+"; tar -C "+n.own(t).Dir+" -c x-"+t.Name()[len(t.Name())-2:]+" | docker -H unix://"+n.own(t).Socket+" import - behind/one:1"))
		eventually(t, "the new image is seen", func() bool { return n.imageStatus(t, "behind/one:1").GetId() == id })
		n.docker(t, "tag", "behind/one:1", "behind/two:2")
		eventually(t, "the new name is seen", func() bool { return n.imageStatus(t, "behind/two:2").GetId() == id })
		n.docker(t, "rmi", "behind/one:1")
		eventually(t, "the removed name is gone", func() bool { return n.imageStatus(t, "behind/one:1") == nil })
		n.docker(t, "tag", "behind/two:2", "behind/three:3")
		eventually(t, "the third name is seen", func() bool { return n.imageStatus(t, "behind/three:3") != nil })
		for range 2 {
			if _, err := n.Image.RemoveImage(t.Context(), &runtimeapi.RemoveImageRequest{Image: &runtimeapi.ImageSpec{Image: "behind/two:2"}}); err != nil {
				t.Errorf("RemoveImage: %v", err)
			}
		}
		if got := n.imageStatus(t, "behind/three:3"); got != nil {
			t.Errorf("RemoveImage left a name of the image: %v", got)
		}
	})
}

func TestPauseImageIsPinned(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		n.removePod(t, n.runPod(t, n.podConfig(t)))
		l, err := n.Image.ListImages(t.Context(), &runtimeapi.ListImagesRequest{})
		if err != nil {
			t.Fatal(err)
		}
		for _, i := range l.Images {
			if len(i.RepoTags) > 0 && strings.HasPrefix(i.RepoTags[0], "cri-dockerd.local/pause:") {
				if !i.Pinned {
					t.Errorf("not pinned: %v", i)
				}
				if _, err := n.Image.RemoveImage(t.Context(), &runtimeapi.RemoveImageRequest{Image: &runtimeapi.ImageSpec{Image: i.Id}}); status.Code(err) != codes.FailedPrecondition {
					t.Errorf("removal of the pause image: %v", err)
				}
				return
			}
		}
		t.Errorf("no pause image among %v", l.Images)
	})
}
