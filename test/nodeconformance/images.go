package main

import (
	"archive/tar"
	"os"
	"path/filepath"

	"cri-dockerd/test/engines"
)

// registry is where the suite's images come from elsewhere.
const registry = "registry.k8s.io/e2e-test-images/"

// loadImages makes the suite's images of agnhost, built from the same source as the suite, and of busybox. Each tag has an ID of its own, for
// some tests tell images apart by it.
func loadImages(h *engines.Program, socket, built string) {
	agnhost, err := os.ReadFile(filepath.Join(built, "agnhost"))
	if err != nil {
		h.Fatalf("images: %v", err)
	}
	users := engines.File{Header: tar.Header{Name: "etc/passwd", Mode: 0o644}, Content: []byte(
		"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\nuser-defined-in-image:x:1000:1000::/home:/bin/sh\n")}
	groups := engines.File{Header: tar.Header{Name: "etc/group", Mode: 0o644}, Content: []byte(
		"root:x:0:\nnogroup:x:65534:\nuser-defined-in-image:x:1000:\ngroup-defined-in-image:x:50000:user-defined-in-image\n")}
	base := append(engines.BusyboxFiles(h), users, groups,
		engines.File{Header: tar.Header{Name: "uploads/", Typeflag: tar.TypeDir, Mode: 0o1777}})
	with := append(base[:len(base):len(base)], engines.File{Header: tar.Header{Name: "agnhost", Mode: 0o755}, Content: agnhost},
		engines.File{Header: tar.Header{Name: "agnhost-2", Typeflag: tar.TypeSymlink, Linkname: "agnhost"}})
	const path = "ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
	for _, ref := range []string{"agnhost:2.63.0", "agnhost:2.55"} {
		engines.Import(h, socket, registry+ref, with, path, "LABEL tag="+ref, `ENTRYPOINT ["/agnhost"]`, `CMD ["pause"]`)
	}
	for _, ref := range []string{"nginx:1.15-4", "nginx:1.27-0"} {
		engines.Import(h, socket, registry+ref, with, path, "LABEL tag="+ref, `ENTRYPOINT ["/agnhost"]`, `CMD ["netexec", "--http-port=80"]`)
	}
	for _, ref := range []string{"busybox:1.37.0-1", "ipc-utils:1.4", "glibc-dns-testing:2.0.0"} {
		engines.Import(h, socket, registry+ref, base, path, "LABEL tag="+ref, `CMD ["sh"]`)
	}
	engines.Import(h, socket, registry+"nonroot:1.5", base, path, "USER 1234", `CMD ["sh"]`)
	engines.Import(h, socket, "registry.k8s.io/pause:3.10.2", with, path, `ENTRYPOINT ["/agnhost", "pause"]`)
}
