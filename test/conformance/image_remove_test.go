package conformance

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/moby/moby/client"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/test/registry"
)

func (n *node) removeImage(t *testing.T, ref string) error {
	_, err := n.Image.RemoveImage(t.Context(), &runtimeapi.RemoveImageRequest{Image: &runtimeapi.ImageSpec{Image: ref}})
	return err
}

// TestRemoveImage removes images by every kind of name, twice, and twice in parallel. An image in
// use keeps its names.
func TestRemoveImage(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		r := n.registry(t)
		pulled := func(t *testing.T) (id string, refs []string) {
			t.Helper()
			i := registry.Random(t, "amd64", v1.Config{Cmd: []string{"/none"}}, 1, 1000)
			name := strings.ToLower(t.Name()[strings.LastIndex(t.Name(), "/")+1:])
			for _, repository := range []string{"remove/a-" + name, "remove/b-" + name} {
				for _, tag := range []string{"1", "2"} {
					ref := r.Put(t, repository, tag, i)
					got, err := n.pull(t.Context(), ref, nil)
					if err != nil {
						t.Fatal(err)
					}
					id, refs = got, append(refs, ref)
				}
			}

			return id, refs
		}

		for by, name := range map[string]func(id string, refs []string) string{
			"tag":    func(_ string, refs []string) string { return refs[1] },
			"ID":     func(id string, _ []string) string { return id },
			"prefix": func(id string, _ []string) string { return strings.TrimPrefix(id, "sha256:")[:16] },
			"digest": func(id string, _ []string) string { return n.imageStatus(t, id).RepoDigests[0] },
		} {
			t.Run(by, func(t *testing.T) {
				id, refs := pulled(t)
				ref := name(id, refs)
				errs := make(chan error, 2)
				for range 2 {
					go func() { errs <- n.removeImage(t, ref) }()
				}

				for range 2 {
					if err := <-errs; err != nil {
						t.Errorf("RemoveImage %s: %v", ref, err)
					}
				}

				for _, name := range append(refs, id) {
					if i := n.imageStatus(t, name); i != nil {
						t.Errorf("ImageStatus %s after the removal: %v", name, i)
					}
				}

				if err := n.removeImage(t, ref); err != nil {
					t.Errorf("RemoveImage of a removed image: %v", err)
				}
			})
		}

		t.Run("used", func(t *testing.T) {
			id, refs := pulled(t)
			removeUsedImage(t, n, id, refs)
		})
	})
}

// removeUsedImage removes an image in use by two containers, one of a pod and one created with
// docker. Removals fail until both are removed.
func removeUsedImage(t *testing.T, n *node, id string, refs []string) {
	pod := n.podConfig(t)
	sandbox := n.runPod(t, pod)
	cc := n.containerConfig([]string{"/none"})
	cc.Image.Image = refs[0]
	n.create(t, sandbox, pod, cc)
	unmanaged := strings.TrimSpace(n.docker(t, "create", refs[1]))
	for i, free := range []func(){func() { n.removePod(t, sandbox) }, func() { n.docker(t, "rm", unmanaged) }} {
		for _, ref := range []string{refs[3], id} {
			if err := n.removeImage(t, ref); status.Code(err) != codes.FailedPrecondition {
				t.Errorf("RemoveImage %s with %d users: %v, want FailedPrecondition", ref, 2-i, err)
			}
		}

		if i := n.imageStatus(t, id); !equalSets(i.GetRepoTags(), refs) {
			t.Errorf("remaining names: %v", i)
		}

		free()
	}

	if err := n.removeImage(t, refs[2]); err != nil || n.imageStatus(t, id) != nil {
		t.Errorf("RemoveImage without a user: %v", err)
	}
}

// TestRemoveImageByDigest pulls images by digest, alone and next to a tag, and removes them by each
// of their names.
func TestRemoveImageByDigest(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		r := n.registry(t)
		for name, c := range map[string]struct {
			tagged, index bool // also pulled by tag; the digest is that of an index
			remove        func(tag, digest, id string) string
		}{
			"digest":            {remove: func(_, digest, _ string) string { return digest }},
			"id":                {remove: func(_, _, id string) string { return id }},
			"index":             {index: true, remove: func(_, digest, _ string) string { return digest }},
			"digest-beside-tag": {tagged: true, remove: func(_, digest, _ string) string { return digest }},
			"tag-beside-digest": {tagged: true, remove: func(tag, _, _ string) string { return tag }},
			"tag-and-digest": {tagged: true, remove: func(tag, digest, _ string) string {
				return tag + digest[strings.Index(digest, "@"):]
			}},
			"index-with-own-tag": {tagged: true, index: true, remove: func(_, digest, _ string) string {
				return digest
			}},
		} {
			t.Run(name, func(t *testing.T) {
				image := registry.Random(t, "amd64", v1.Config{Cmd: []string{"/none"}}, 2, 1000)
				var pushed remote.Taggable = image
				digest, err := image.Digest()
				if c.index {
					index := registry.Index(t, map[string]v1.Image{"amd64": image})
					pushed = index
					digest, err = index.Digest()
				}

				if err != nil {
					t.Fatal(err)
				}

				tag := r.Put(t, "remove/"+name, "1", pushed)
				byDigest := r.Host + "/remove/" + name + "@" + digest.String()

				id, err := n.pull(t.Context(), byDigest, nil)
				if err != nil {
					t.Fatal(err)
				}

				if c.tagged {
					if again, err := n.pull(t.Context(), tag, nil); err != nil || again != id {
						t.Fatalf("pull by tag: %s, %v; want %s", again, err, id)
					}
				}

				listed := n.listImages(t, byDigest)
				if len(listed) != 1 {
					t.Errorf("ListImages %s: %v, want one image", byDigest, listed)
				}

				for _, i := range listed {
					if i.Id != id || len(i.RepoTags) > 0 != c.tagged ||
						strings.Contains(strings.Join(i.RepoTags, " "), "@") ||
						!slices.Contains(i.RepoDigests, byDigest) {
						t.Errorf("ListImages %s: %v", byDigest, i)
					}
				}

				if err := n.removeImage(t, c.remove(tag, byDigest, id)); err != nil {
					t.Fatal(err)
				}

				for _, ref := range []string{id, tag, byDigest} {
					if images := n.listImages(t, ref); len(images) > 0 {
						t.Errorf("ListImages %s after the removal: %v", ref, images)
					}
				}

				if list := n.listImages(t, ""); countImages(&runtimeapi.ListImagesResponse{Images: list}, id) > 0 {
					t.Errorf("ListImages has the removed image: %v", list)
				}
				if out := n.dockerImages(t); strings.Contains(out, strings.TrimPrefix(id, "sha256:")) {
					t.Errorf("the engine has the removed image:\n%s", out)
				}
			})
		}
	})
}

// dockerImages lists all images of the engine, including those without a name.
func (n *node) dockerImages(t *testing.T) string {
	t.Helper()
	list, err := n.own(t).Docker(t).ImageList(t.Context(), client.ImageListOptions{All: true})
	if err != nil {
		t.Fatal(err)
	}

	var out strings.Builder
	for _, i := range list.Items {
		fmt.Fprintln(&out, i.ID, i.RepoTags, i.RepoDigests)
	}

	return out.String()
}
