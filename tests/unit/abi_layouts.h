/*
 * The C side of vfiomig's structs, declared from the field lists of Linux 7.3 and of the patch
 * "vfio: Define device migration protocol v2", because the headers of the machine that runs the
 * tests may be older or absent. A flexible array at the end is left out, pointers are __u64,
 * and unions are represented by the member that vfiomig names.
 */

/* linux/vfio.h: device */

struct vfio_info_cap_header { __u16 id; __u16 version; __u32 next; };
struct vfio_device_info {
	__u32 argsz; __u32 flags; __u32 num_regions; __u32 num_irqs; __u32 cap_offset; __u32 pad;
};
struct vfio_region_info {
	__u32 argsz; __u32 flags; __u32 index; __u32 cap_offset; __u64 size; __u64 offset;
};
struct vfio_region_sparse_mmap_area { __u64 offset; __u64 size; };
struct vfio_region_info_cap_sparse_mmap {
	struct vfio_info_cap_header header; __u32 nr_areas; __u32 reserved;
};
struct vfio_region_info_cap_type {
	struct vfio_info_cap_header header; __u32 type; __u32 subtype;
};
struct vfio_irq_info { __u32 argsz; __u32 flags; __u32 index; __u32 count; };
struct vfio_irq_set { __u32 argsz; __u32 flags; __u32 index; __u32 start; __u32 count; };
struct vfio_pci_dependent_device { __u32 group_id; __u16 segment; __u8 bus; __u8 devfn; };
struct vfio_pci_hot_reset_info { __u32 argsz; __u32 flags; __u32 count; };
struct vfio_pci_hot_reset { __u32 argsz; __u32 flags; __u32 count; };
struct vfio_device_bind_iommufd {
	__u32 argsz; __u32 flags; __s32 iommufd; __u32 out_devid; __u64 token_uuid_ptr;
};
struct vfio_device_attach_iommufd_pt { __u32 argsz; __u32 flags; __u32 pt_id; __u32 pasid; };
struct vfio_device_detach_iommufd_pt { __u32 argsz; __u32 flags; __u32 pasid; };

/* linux/vfio.h: features and migration */

struct vfio_device_feature { __u32 argsz; __u32 flags; };
struct vfio_device_low_power_entry_with_wakeup { __s32 wakeup_eventfd; __u32 reserved; };
struct vfio_device_feature_migration { __u64 flags; };
struct vfio_device_feature_mig_state { __u32 device_state; __s32 data_fd; };
struct vfio_device_feature_mig_data_size { __u64 stop_copy_length; };
struct vfio_precopy_info {
	__u32 argsz; __u32 flags; __u64 initial_bytes; __u64 dirty_bytes;
};
struct vfio_device_feature_dma_logging_control {
	__u64 page_size; __u32 num_ranges; __u32 __reserved; __u64 ranges;
};
struct vfio_device_feature_dma_logging_range { __u64 iova; __u64 length; };
struct vfio_device_feature_dma_logging_report {
	__u64 iova; __u64 length; __u64 page_size; __u64 bitmap;
};
struct vfio_device_mig_set_state {
	__u32 argsz; __u32 device_state; __s32 data_fd; __u32 flags;
};
struct vfio_device_migration_info {
	__u32 device_state; __u32 reserved; __u64 pending_bytes; __u64 data_offset; __u64 data_size;
};

/* linux/vfio.h: group, container, type1 */

struct vfio_group_status { __u32 argsz; __u32 flags; };
struct vfio_iommu_type1_info {
	__u32 argsz; __u32 flags; __u64 iova_pgsizes; __u32 cap_offset; __u32 pad;
};
struct vfio_iova_range { __u64 start; __u64 end; };
struct vfio_iommu_type1_info_cap_iova_range {
	struct vfio_info_cap_header header; __u32 nr_iovas; __u32 reserved;
};
struct vfio_iommu_type1_info_cap_migration {
	struct vfio_info_cap_header header; __u32 flags; __u64 pgsize_bitmap;
	__u64 max_dirty_bitmap_size;
};
struct vfio_iommu_type1_info_dma_avail { struct vfio_info_cap_header header; __u32 avail; };
struct vfio_iommu_type1_dma_map {
	__u32 argsz; __u32 flags; __u64 vaddr; __u64 iova; __u64 size;
};
struct vfio_iommu_type1_dma_unmap { __u32 argsz; __u32 flags; __u64 iova; __u64 size; };
struct vfio_bitmap { __u64 pgsize; __u64 size; __u64 data; };
struct vfio_iommu_type1_dirty_bitmap { __u32 argsz; __u32 flags; };
struct vfio_iommu_type1_dirty_bitmap_get {
	__u64 iova; __u64 size; struct vfio_bitmap bitmap;
};

/* linux/iommufd.h */

struct iommu_destroy { __u32 size; __u32 id; };
struct iommu_ioas_alloc { __u32 size; __u32 flags; __u32 out_ioas_id; };
struct iommu_iova_range { __u64 start; __u64 last; };
struct iommu_ioas_iova_ranges {
	__u32 size; __u32 ioas_id; __u32 num_iovas; __u32 __reserved; __u64 allowed_iovas;
	__u64 out_iova_alignment;
};
struct iommu_ioas_allow_iovas {
	__u32 size; __u32 ioas_id; __u32 num_iovas; __u32 __reserved; __u64 allowed_iovas;
};
struct iommu_ioas_map {
	__u32 size; __u32 flags; __u32 ioas_id; __u32 __reserved; __u64 user_va; __u64 length;
	__u64 iova;
};
struct iommu_ioas_map_file {
	__u32 size; __u32 flags; __u32 ioas_id; __s32 fd; __u64 start; __u64 length; __u64 iova;
};
struct iommu_ioas_copy {
	__u32 size; __u32 flags; __u32 dst_ioas_id; __u32 src_ioas_id; __u64 length;
	__u64 dst_iova; __u64 src_iova;
};
struct iommu_ioas_unmap { __u32 size; __u32 ioas_id; __u64 iova; __u64 length; };
struct iommu_option {
	__u32 size; __u32 option_id; __u16 op; __u16 __reserved; __u32 object_id; __u64 val64;
};
struct iommu_vfio_ioas { __u32 size; __u32 ioas_id; __u16 op; __u16 __reserved; };
struct iommu_hwpt_alloc {
	__u32 size; __u32 flags; __u32 dev_id; __u32 pt_id; __u32 out_hwpt_id; __u32 __reserved;
	__u32 data_type; __u32 data_len; __u64 data_uptr; __u32 fault_id; __u32 __reserved2;
};
struct iommu_hw_info {
	__u32 size; __u32 flags; __u32 dev_id; __u32 data_len; __u64 data_uptr;
	__u32 out_data_type; __u8 out_max_pasid_log2; __u8 __reserved[3]; __u64 out_capabilities;
};
struct iommu_hwpt_set_dirty_tracking {
	__u32 size; __u32 flags; __u32 hwpt_id; __u32 __reserved;
};
struct iommu_hwpt_get_dirty_bitmap {
	__u32 size; __u32 hwpt_id; __u32 flags; __u32 __reserved; __u64 iova; __u64 length;
	__u64 page_size; __u64 data;
};

/* linux/filter.h, linux/seccomp.h, linux/kvm.h */

struct sock_filter { __u16 code; __u8 jt; __u8 jf; __u32 k; };
struct sock_fprog { __u16 len; __u64 filter; };
struct seccomp_data { __s32 nr; __u32 arch; __u64 instruction_pointer; __u64 args[6]; };
struct seccomp_notif_sizes {
	__u16 seccomp_notif; __u16 seccomp_notif_resp; __u16 seccomp_data;
};
struct seccomp_notif { __u64 id; __u32 pid; __u32 flags; struct seccomp_data data; };
struct seccomp_notif_resp { __u64 id; __s64 val; __s32 error; __u32 flags; };
struct seccomp_notif_addfd {
	__u64 id; __u32 flags; __u32 srcfd; __u32 newfd; __u32 newfd_flags;
};
struct kvm_device_attr { __u32 flags; __u32 group; __u64 attr; __u64 addr; };

/* linux/aio_abi.h */

struct iocb {
	__u64 aio_data; __u32 aio_key; __s32 aio_rw_flags; __u16 aio_lio_opcode; __s16 aio_reqprio;
	__u32 aio_fildes; __u64 aio_buf; __u64 aio_nbytes; __s64 aio_offset; __u64 aio_reserved2;
	__u32 aio_flags; __u32 aio_resfd;
};
struct io_event { __u64 data; __u64 obj; __s64 res; __s64 res2; };

/* vfio-user: the messages that carry no struct of linux/vfio.h */

struct vfio_user_header {
	__u16 msg_id; __u16 cmd; __u32 msg_size; __u32 flags; __u32 error_no;
};
struct vfio_user_version { __u16 major; __u16 minor; };
struct vfio_user_dma_map { __u32 argsz; __u32 flags; __u64 offset; __u64 addr; __u64 size; };
struct vfio_user_dma_unmap { __u32 argsz; __u32 flags; __u64 addr; __u64 size; };
struct vfio_user_bitmap { __u64 pgsize; __u64 size; };
struct vfio_user_dma_region_access { __u64 addr; __u64 count; };
struct vfio_user_device_info { __u32 argsz; __u32 flags; __u32 num_regions; __u32 num_irqs; };
struct vfio_user_region_io_fds { __u32 argsz; __u32 flags; __u32 index; __u32 count; };
struct vfio_user_region_access { __u64 offset; __u32 region; __u32 count; };
struct vfio_user_write_multi { __u64 wr_cnt; };
struct vfio_user_write_one { __u64 offset; __u32 region; __u32 count; __u8 data[8]; };
struct vfio_user_dma_logging_control { __u64 page_size; __u32 num_ranges; __u32 reserved; };
struct vfio_user_dma_logging_report { __u64 iova; __u64 length; __u64 page_size; };
struct vfio_user_mig_data { __u32 argsz; __u32 size; };
